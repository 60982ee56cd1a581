"use strict";
const main = document.querySelector("main");
const form = document.getElementById("filters");
const shown = document.getElementById("shown");
const articles = Array.from(document.querySelectorAll("article"), (element) => ({
  element,
  sections: Array.from(element.querySelectorAll(".section")),
  text: null,
}));

// A search ignores case and accents.
const fold = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

// The text of the data, without the page's own labels.
const textOf = (element) =>
  fold(Array.from(element.querySelectorAll(".dialogue, .text, .reason, .raw"), (part) => part.textContent).join("\n"));

function applyFilters() {
  const section = form.elements.section.value;
  const verdict = form.elements.verdict.value;
  const group = form.elements.group?.value ?? "all";
  const faults = ["missing", "unsupported"].filter((name) => form.elements[name]?.checked);
  if (form.elements.marks) main.dataset.marks = form.elements.marks.value;
  const words = fold(form.elements.query.value).split(/\s+/).filter(Boolean);
  let dialogues = 0;
  let sections = 0;
  for (const article of articles) {
    if (words.length && article.text === null) article.text = textOf(article.element);
    const found = ["all", article.element.dataset.group].includes(group)
      && words.every((word) => article.text.includes(word));
    let matches = 0;
    for (const element of article.sections) {
      const match = found && ["all", element.dataset.section].includes(section)
        && ["all", element.dataset.verdict].includes(verdict)
        && faults.every((name) => element.dataset[name] > 0);
      element.hidden = !match;
      matches += match;
    }
    article.element.hidden = matches === 0;
    dialogues += matches > 0;
    sections += matches;
  }
  shown.value = `${dialogues} of ${articles.length} dialogues, ${sections} sections shown`;
}

form.hidden = false;
form.addEventListener("input", applyFilters);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(applyFilters));
applyFilters();
