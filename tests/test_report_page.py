import itertools
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from report_data import (
    HOSTILE,
    add_statements,
    add_statements_to_comparison,
    all_labels,
    attacks,
    by_people,
    check,
    make_comparison,
    make_results,
    make_run,
    runs_of,
    statement_records,
)

from evaluation.report import html
from evaluation.scoring.scores import score_run
from prompts import SECTIONS


@pytest.fixture
def results() -> dict:
    return make_results()


@pytest.fixture
def results_of_an_unproven_judge(results: dict) -> dict:
    results["judge_controls"]["O"] = check(0.95, 0.05, False)
    results["judge_controls"]["P"] = check(0.5, 0.5, False)
    return results


@pytest.fixture
def comparison() -> dict:
    return make_comparison()


# --- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        if os.environ.get("CI"):
            pytest.fail("no chromium on this machine; CI installs Debian's package `chromium`")
        pytest.skip("no chromium on this machine (Debian's package: chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--disable-gpu", "--disable-quic", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a report from disk; fail if it logs, throws or requests anything from the network."""
    contexts, complaints, requests = [], [], []

    def open_page(path: Path, width: int = 1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    open_page.complaints, open_page.requests = complaints, requests
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(tmp_path.as_uri())] == []


@pytest.fixture
def small_report(results, tmp_path) -> Path:
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(*make_run(10, words=200)))
    return tmp_path / "report.html"


@pytest.fixture
def hostile_report(results, tmp_path) -> Path:
    """Write a report whose every text is hostile, from the model's name to the judge's reasons."""
    predictions, judgements, rows = make_run(len(HOSTILE), words=200)
    for row, prediction, text in zip(rows, predictions, HOSTILE, strict=True):
        row.update(dict.fromkeys(row, text))
        prediction.update(raw=text, reason=prediction["reason"] and text)
        if prediction["status"] == "ok":
            prediction.update({key: f"{text} {key}" for key in SECTIONS})
    records = statement_records(predictions, rows)
    for record in [*judgements, *records]:
        record["reason"] = HOSTILE[record["index"]]
    records[0]["supported"] += [{"statement": f"lost {text}", "log_odds": None} for text in HOSTILE]
    predictions[3] |= {"status": "lenient", "reason": HOSTILE[3], "form": HOSTILE[3]}
    results = add_statements(results)
    results["lenient"]["forms"] = dict.fromkeys(HOSTILE, 1)
    for key in ("model", "lora_path", "judge_model", "dataset", "split"):
        results[key] = "".join(HOSTILE)
    results["versions"] = {HOSTILE[0]: HOSTILE[1]}
    results["attacks"] = {**attacks(), "by_kind": {text: attacks() for text in HOSTILE}}
    view = html.select_dialogues(predictions, judgements, rows, records)
    html.write_report(tmp_path / "hostile.html", results, view)
    return tmp_path / "hostile.html"


def shown(page) -> tuple[int, int]:
    """Return the numbers of visible dialogues and sections."""
    count = "selector => Array.from(document.querySelectorAll(selector)).filter(e => e.checkVisibility()).length"
    return page.evaluate(count, "article"), page.evaluate(count, "article .section")


def test_filters_keep_the_sections_that_match_both(open_page, small_report):
    page = open_page(small_report)
    assert shown(page) == (10, 40)
    page.get_by_role("radio", name="Objective").check()
    assert shown(page) == (10, 10)
    page.get_by_role("radio", name="fail").check()
    assert shown(page) == (4, 4)  # O of dialogues 0, 3 and 6, and of 9, which is unreadable
    assert page.get_by_role("status").inner_text() == "4 of 10 dialogues, 4 sections shown"
    page.get_by_role("radio", name="all").first.check()
    assert shown(page) == (10, 16)
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("status").get_by_text("10 of 10 dialogues, 40 sections shown").wait_for()
    assert shown(page) == (10, 40)


def test_search_finds_words_in_dialogues_notes_and_reasons(open_page, results, tmp_path):
    predictions, judgements, rows = make_run(10, words=200)
    rows[2]["dialogue"] += "\nPatient: Since Tuesday my ANKLE hurts."
    predictions[4]["P"] += " Ménière"
    judgements[4 * 6]["reason"] = "The ankle is missing."
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(predictions, judgements, rows))
    page = open_page(tmp_path / "report.html")
    search = page.get_by_role("searchbox", name="Search")
    for text, dialogues in (("ankle", 2), ("tuesday ankle", 1), ("meniere", 1), ("ankle meniere", 0), ("", 10)):
        search.fill(text)
        assert shown(page)[0] == dialogues, text
    search.fill("Prediction")  # a label of the page, not part of the data
    assert shown(page)[0] == 0


def test_filters_work_with_the_keyboard_alone(open_page, small_report):
    page = open_page(small_report)
    page.get_by_role("radio", name="all").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == (9, 12)
    page.keyboard.press("Tab")
    page.keyboard.type("number 8")
    page.keyboard.press("Enter")  # does not submit the form
    assert shown(page) == (1, 1)


def test_injected_scripts_are_shown_as_text_and_do_not_run(open_page, hostile_report):
    page = open_page(hostile_report)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate("window.injected") is None
    assert page.locator("script").count() == 1
    assert page.locator("article :is(img, svg, style, iframe, base, meta, form)").count() == 0
    for text in HOSTILE[:6]:
        assert page.locator("article .text", has_text=text).count() >= 4, text
    body = page.locator("body").inner_text()
    assert "{{ 7 * 7 }} {% raw %} ${7 * 7}" in body
    assert "NUL ␀, escape ␛[31m, half a pair ?, reordered \ufffd50 mg" in body
    assert shown(page) == (len(HOSTILE), 4 * len(HOSTILE))


def test_a_script_added_to_the_page_does_not_run(open_page, small_report):
    page = open_page(small_report)
    blocked = page.evaluate(
        """async () => {
            const blocked = [];
            document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.injected = 1";
            const image = document.createElement("img");
            image.src = "http://127.0.0.1:1/x.png";
            document.body.append(script, image);
            await fetch("http://127.0.0.1:1/").catch(() => {});
            await new Promise((resolve) => setTimeout(resolve, 100));
            return blocked;
        }"""
    )
    assert {"script-src-elem", "img-src", "connect-src"} <= set(blocked)
    assert page.evaluate("window.injected") is None
    assert all("Content Security Policy" in complaint for complaint in open_page.complaints[:3])
    assert open_page.requests[1:] in ([], ["http://127.0.0.1:1/x.png"])  # the blocked image
    open_page.complaints.clear()
    open_page.requests.clear()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(
    open_page, small_report, hostile_report, statements_report, comparison, results, width, tmp_path
):
    comparison, results = add_statements_to_comparison(comparison), add_statements(results)
    html.write_comparison(tmp_path / "comparison.html", comparison, runs_of(comparison, results))
    for path in (small_report, hostile_report, statements_report, tmp_path / "comparison.html"):
        page = open_page(path, width)
        for details in page.locator("details").all():
            details.evaluate("element => element.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") == width, path.name


def test_250_dialogues_open_in_under_two_seconds(open_page, results, tmp_path):
    predictions, judgements, rows = make_run(250)
    records = statement_records(predictions, rows)  # 40 statements for each readable note
    assert sum(len(record["covered"]) + len(record["supported"]) for record in records) == 225 * 40 + 25 * 20
    view = html.select_dialogues(predictions, judgements, rows, records)
    html.write_report(tmp_path / "report.html", add_statements(results), view)
    seconds = []
    for _ in range(2):  # the first start may wait for a busy disk
        page = open_page(tmp_path / "report.html")
        page.get_by_role("status").get_by_text("250 of 250").wait_for()
        timing = "Math.max(...performance.getEntries().map(entry => entry.loadEventEnd || entry.startTime)) / 1000"
        seconds.append(page.evaluate(timing))
    assert min(seconds) < 2
    milliseconds = page.evaluate(
        """() => {
            const start = performance.now();
            document.querySelector("[name=query]").value = "number 24";
            document.getElementById("filters").dispatchEvent(new Event("input"));
            document.body.offsetHeight;
            return performance.now() - start;
        }"""
    )
    assert shown(page)[0] == 13  # 24, 124, 224, 240 to 249
    assert milliseconds < 1000


def test_print_shows_the_notes_without_filters_on_white(open_page, small_report):
    page = open_page(small_report, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 24)"
    page.get_by_role("radio", name="Plan").check()
    page.emulate_media(media="print")
    assert not page.locator("fieldset, nav, button, input").filter(visible=True).all()
    assert page.get_by_role("status").inner_text() == "10 of 10 dialogues, 10 sections shown"
    assert page.evaluate("getComputedStyle(document.querySelector('article')).contentVisibility") == "visible"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 28, 26)"


def test_every_note_can_be_read_without_javascript(open_page, small_report):
    page = open_page(small_report, java_script_enabled=False)
    assert page.locator("article .section:visible").count() == 40
    assert not page.locator("form").is_visible()


def test_the_report_shows_table_chart_and_checks_of_the_judge(open_page, results, tmp_path):
    results["attacks"] = attacks()
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    results["human_labels_all"] = all_labels()
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(*make_run(2, words=200)))
    page = open_page(tmp_path / "report.html")
    assert page.get_by_role("heading", level=1).inner_text() == "Qwen3-1.7B + Qwen3-1.7B-LoRA"
    table = page.get_by_role("region", name="Results for each section").inner_text()
    assert re.search(r"S Subjective\s+64\.4%\s+58\.4–70\.4%\s+4\s+64\.4–66\.0%\s+0\.412", table)
    chart = "S: pass rate 64.4%, 95% interval 58.4–70.4%; by people 60.0%, 45.0–75.0%"
    assert page.get_by_role("img", name=chart).is_visible()
    assert "by people’s verdicts 60.0% (50.0–70.0%)" in page.locator("header").first.inner_text()
    text = page.locator("main").inner_text()
    for words in (
        "Sensitivity",
        "turned negation",
        "4 of 20 attacks passed where another patient's section alone failed: 20.0%",
        "Cohen's kappa 0.74",
        "Judge and people agree on S 86.0%",
    ):
        assert words in text
    assert page.get_by_text("Not for clinical use.").count() == 2
    assert page.locator(".alarm").count() == 0


def test_the_report_warns_of_an_unproven_judge(open_page, results_of_an_unproven_judge, tmp_path):
    html.write_report(tmp_path / "report.html", results_of_an_unproven_judge, [])
    page = open_page(tmp_path / "report.html")
    assert page.locator(".alarm:visible").count() == 2
    assert "It could not be shown that the judge" in page.locator("header .alarm").inner_text()
    for name in ("Results for each section", "The judge on sections with known answers"):
        assert page.get_by_role("region", name=name).get_by_text("judge unproven").count() == 2
    assert page.get_by_role("img", name="by people").count() == 0


def test_an_unchecked_judge_and_an_empty_run_have_a_report(open_page, results, tmp_path):
    results |= {"judge_controls": None, "n": 0, "valid_notes": 0}
    html.write_report(tmp_path / "report.html", results, [])
    page = open_page(tmp_path / "report.html")
    assert page.get_by_text("The judge was not checked in this run").is_visible()
    assert page.get_by_role("status").inner_text() == "0 of 0 dialogues, 0 sections shown"


def test_the_page_shows_the_groups_and_filters_dialogues_by_them(open_page, results, tmp_path):
    values = ["ent"] * 6 + ["cardiology"] * 5 + ["eye", "skin", ""]
    predictions, judgements, rows = make_run(14, words=200)
    records = statement_records(predictions, rows)
    results = add_statements(results) | score_run(predictions, judgements, rows, None, records, ("clinic", values))
    view = html.select_dialogues(predictions, judgements, rows, records, values=values)
    html.write_report(tmp_path / "report.html", results, view)
    page = open_page(tmp_path / "report.html", 390)
    table = page.get_by_role("region", name="Results for each group of dialogues")
    assert table.get_by_role("rowheader").all_inner_texts() == ["ent", "cardiology", "other (3 values)"]
    assert page.get_by_role("heading", name="By clinic").count() == 1
    choice = page.get_by_role("combobox", name="clinic")
    for name, dialogues in (("ent", 6), ("cardiology", 5), ("other (3 values)", 3), ("all", 14)):
        choice.select_option(name)
        assert shown(page)[0] == dialogues
    choice.select_option("other (3 values)")
    badges = page.locator("article:visible h3 .badge").all_text_contents()
    assert badges == ["eye", "skin", "(missing)"]
    page.get_by_role("radio", name="Objective").check()
    assert shown(page) == (3, 3)
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("status").get_by_text("14 of 14 dialogues").wait_for()


def test_hostile_values_are_shown_as_text_on_a_page_as_wide_as_the_screen(open_page, results, tmp_path):
    values = [text for text in HOSTILE for _ in range(5)]
    predictions, judgements, rows = make_run(len(values), words=200)
    results |= score_run(predictions, judgements, rows, None, (), ("".join(HOSTILE), values))
    view = html.select_dialogues(predictions, judgements, rows, values=values)
    html.write_report(tmp_path / "report.html", results, view)
    page = open_page(tmp_path / "report.html", 390)
    assert page.evaluate("window.injected") is None
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("article h3 .badge", has_text=HOSTILE[1]).count() == 5


def test_the_comparison_page_shows_rates_differences_and_flips(open_page, comparison, results, tmp_path):
    comparison["pairs"][0]["sections"]["A"] |= {"n": 0, "difference": None, "ci95": None, "p": None}
    html.write_comparison(tmp_path / "comparison.html", comparison, runs_of(comparison, results))
    page = open_page(tmp_path / "comparison.html")
    rates = page.get_by_role("region", name="Pass rates of all runs")
    assert rates.locator("b").all_inner_texts() == ["73.6%", "72.4%", "69.2%", "70.8%", "70.8%", "71.5%"]
    unjudged = page.get_by_role("region", name="Readable notes and ROUGE-L of all runs").inner_text()
    assert "247 of 250" in unjudged and "ROUGE-L, P" in unjudged
    pairs = page.get_by_role("region", name="Finetuned against Qwen3-1.7B").inner_text()
    assert re.search(r"O Objective\s+\+22\.6\s+\+14\.6 to \+30\.6\s+< 0\.001\s+43\s+12\s+1", pairs)
    assert page.get_by_role("img", name="points").count() == 11
    page.locator("summary").first.click()
    assert page.get_by_text("S, fail to pass (2): dialogues 3, 17").first.is_visible()


# --- statements in a browser -----------------------------------------------------------------------------------------


@pytest.fixture
def statements_report(results, tmp_path) -> Path:
    """Write a report of 10 dialogues: 5 statements a text, dialogue 3 in another form, dialogue 9 unreadable."""
    predictions, judgements, rows = make_run(10, words=200)
    predictions[3] |= {"status": "lenient", "reason": "no JSON object", "form": "headings"}
    records = statement_records(predictions, rows)
    records[0]["supported"].append({"statement": "Nowhere in the note.", "log_odds": -1.0})
    view = html.select_dialogues(predictions, judgements, rows, records, threshold=0.5)
    html.write_report(tmp_path / "report.html", add_statements(results), view)
    return tmp_path / "report.html"


def expected_states(predictions: list[dict], rows: list[dict], threshold: float) -> Counter:
    """Count the states of the statements that `statement_records` makes, independently of the report."""
    count = Counter()
    for record in statement_records(predictions, rows):
        for name, no in (("covered", "missing"), ("supported", "unsupported")):
            for entry in record[name]:
                if record["status"] == "missing":
                    count[no] += 1
                elif entry["log_odds"] is None:
                    count["unscored"] += 1
                else:
                    count[name if entry["log_odds"] >= threshold else no] += 1
    return count


def test_missing_and_unsupported_statements_are_marked_in_the_texts(open_page, statements_report):
    page = open_page(statements_report)
    predictions, _, rows = make_run(10, words=200)
    expected = expected_states(predictions, rows, 0.5)
    assert min(expected[state] for state in ("missing", "unsupported", "unscored")) > 0
    texts = page.locator("article .pair > div")
    for state in ("missing", "unsupported", "unscored"):
        assert texts.locator(f"p.text .{state}").count() == expected[state], state
    assert page.locator(".pair > div:nth-child(2) .missing").count() == 0
    assert page.locator(".pair > div:nth-child(1) .unsupported").count() == 0
    titles = page.locator("p.text .unsupported").evaluate_all("marks => marks.map(mark => mark.title)")
    assert all(re.fullmatch(r"unsupported, log odds [+−]\d+\.\d\d", title) for title in titles)


def test_marks_change_no_character_of_a_note(open_page, statements_report):
    page = open_page(statements_report)
    predictions, _, rows = make_run(10, words=200)
    for index in (0, 3, 8):
        texts = page.locator(f"#dialogue-{index} p.text").all_text_contents()
        assert texts == [text for key in SECTIONS for text in (rows[index][key], predictions[index][key])]


def test_each_section_counts_its_statements(open_page, statements_report):
    page = open_page(statements_report)
    unreadable = page.locator("#dialogue-9 .counts").all_text_contents()
    assert unreadable == ["5 of 5 missing"] * 4
    for index in range(9):
        for section in page.locator(f"#dialogue-{index} .section").all():
            states = ("missing", "unsupported", "unscored")
            missing, unsupported, unscored = (section.locator(f".pair .{state}").count() for state in states)
            total = 6 if (index, section.get_attribute("data-section")) == (0, "S") else 5
            text = f"{missing} of 5 missing, {unsupported} of {total} unsupported"
            assert section.locator(".counts").text_content() == text + (f", {unscored} unscored" if unscored else "")


def test_a_statement_that_the_text_lacks_is_listed_below_it(open_page, statements_report):
    page = open_page(statements_report)
    entries = page.locator(".lost li").all_text_contents()
    assert entries == ["Nowhere in the note. unsupported, log odds −1.00"]


def test_filters_keep_sections_with_missing_and_unsupported_statements(open_page, statements_report):
    page = open_page(statements_report)
    count = "names => [...document.querySelectorAll('.section')].filter(s => names.every(n => s.dataset[n] > 0)).length"
    missing = page.get_by_role("checkbox", name="has missing statements")
    unsupported = page.get_by_role("checkbox", name="has unsupported statements")
    missing.check()
    with_missing = shown(page)[1]
    assert 0 < with_missing < 40 and with_missing == page.evaluate(count, ["missing"])
    unreadable = page.locator("#dialogue-9 .section")
    assert unreadable.evaluate_all("sections => sections.every(section => section.checkVisibility())")
    unsupported.check()
    with_both = shown(page)[1]
    assert 0 < with_both < with_missing and with_both == page.evaluate(count, ["missing", "unsupported"])
    assert not page.locator("#dialogue-9").evaluate("article => article.checkVisibility()")
    missing.uncheck()
    assert shown(page)[1] == page.evaluate(count, ["unsupported"])
    page.get_by_role("radio", name="Objective").check()
    assert 0 < shown(page)[1] < page.evaluate(count, ["unsupported"])
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("status").get_by_text("10 of 10 dialogues, 40 sections shown").wait_for()


def test_statements_and_words_are_never_marked_at_once(open_page, statements_report):
    page = open_page(statements_report)
    none = "rgba(0, 0, 0, 0)"
    ground = "element => getComputedStyle(element).backgroundColor"
    word, statement = page.locator("p.text mark").first, page.locator("p.text .missing").first
    assert word.evaluate(ground) == none and statement.evaluate(ground) != none
    page.get_by_role("radio", name="words").check()
    assert word.evaluate(ground) != none and statement.evaluate(ground) == none
    page.get_by_role("button", name="Reset").click()
    page.locator('main[data-marks="statements"]').wait_for()
    marks = [page.locator(f"p.text .{state}").first for state in ("missing", "unsupported", "unscored")]
    assert len({mark.evaluate(ground) for mark in marks}) == 3


def test_statements_can_be_read_without_javascript(open_page, statements_report):
    page = open_page(statements_report, java_script_enabled=False)
    assert page.locator("p.text .missing:visible").count() > 0
    assert page.get_by_text("neither the dialogue nor the expert’s note supports it").is_visible()


def test_a_report_without_statements_has_no_filter_for_them(open_page, small_report):
    page = open_page(small_report)
    assert page.get_by_role("checkbox").count() == 0
    assert page.get_by_role("radio", name="words").count() == 0
    assert page.locator("p.text mark").first.evaluate("e => getComputedStyle(e).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_lenient_notes_have_a_badge_and_the_strict_reason(open_page, statements_report):
    page = open_page(statements_report)
    note = page.locator("#dialogue-3")
    assert note.locator(".badge").text_content() == "read leniently: headings"
    assert "Strict reading fails: no JSON object." in note.text_content()
    assert note.locator(".pair > div:nth-child(2) p.text").count() == 4
    assert page.locator(".badge").count() == 1


def test_the_report_shows_both_instruments_and_which_tells_more(open_page, statements_report):
    page = open_page(statements_report)
    table = page.get_by_role("region", name="Results for each section").inner_text()
    row = "S Subjective 64.4% 58.4–70.4% 65.2% 59.2–71.2% 4 64.4–66.0% 34.4% 28.4–40.4% 2 unscored: 34.4–35.2% 71.2% "
    row += "69.2–73.2% n = 1,250, 2 unscored 83.1% 81.1–85.1% n = 1,250 0.412 readable: 0.417"
    assert row in " ".join(table.split())
    assert page.get_by_role("region", name="Results for each section").get_by_text("judge unproven").count() == 1
    chart = "S: pass rate 64.4%, 95% interval 58.4–70.4%; pass rate by statements 34.4%, 28.4–40.4%; covered 71.2%, "
    assert page.get_by_role("img", name=chart).is_visible()
    checks = page.get_by_role("region", name="Statements in sections with known answers").inner_text()
    assert re.search(r"P Plan\s+50\.0%.*0\.05\s+-0\.15 to 0\.25\s+judge unproven", checks, re.DOTALL)
    areas = page.get_by_role("region", name="AUC of verdicts and statements").inner_text()
    assert re.search(r"All\s+0\.81\s+0\.71 to 0\.89\s+0\.84\s+0\.75 to 0\.92\s+40 good", areas)
    assert page.get_by_text("it could not be shown whether verdicts or statements tell more").is_visible()
    lenient = page.get_by_role("region", name="Rates under lenient reading").inner_text()
    assert re.search(r"Mean\s+60\.0%\s+57\.0–63\.0%", lenient)


def test_the_comparison_page_shows_statements_and_lenient_rates(open_page, comparison, results, tmp_path):
    comparison = add_statements_to_comparison(comparison)
    html.write_comparison(tmp_path / "comparison.html", comparison, runs_of(comparison, add_statements(results)))
    page = open_page(tmp_path / "comparison.html")
    rates = page.get_by_role("region", name="Pass rates by statements").inner_text()
    assert re.search(r"Mean\s+20\.0%.*Covered: .*S Subjective\s+51\.2%.*Supported: .*Mean\s+51\.2%", rates, re.DOTALL)
    lenient = page.get_by_role("region", name="Rates of all runs under lenient reading").inner_text()
    assert "249 of 250" in lenient
    differences = page.get_by_role("region", name="Finetuned against Qwen3-1.7B by statements").inner_text()
    assert re.search(r"Covered\s+\+19\.2\s+\+15\.0 to \+23\.4\s+< 0\.001", differences)
    assert page.get_by_role("img", name="points").count() == 12 + 5  # the second pair has no supported share
    assert page.get_by_role("img", name="Covered: +19.2 points").count() == 3


# --- style -----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb by WCAG 2.2."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_requires(theme):
    css = (Path(html.__file__).parent / "templates" / "report.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(blocks) == 2
    colour = blocks[theme]
    pairs = [*itertools.product(("ink", "soft", "accent"), ("paper", "card")), ("fail", "paper")]
    pairs += [("ink", tint) for tint in ("mark", "none-tint", "fail-tint", "missing-tint")]
    pairs += [(verdict, f"{verdict}-tint") for verdict in ("pass", "fail", "none")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colour[text]), luminance(colour[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
