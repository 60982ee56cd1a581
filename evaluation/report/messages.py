"""Sentences on how far a run's judge can be trusted, for the console and the pages."""

from evaluation.report.figures import group_name, interval, p_value, percent, points, points_interval
from evaluation.run.records import QUESTIONS
from evaluation.scoring.slices import MOST_GROUPS, SMALLEST_GROUP

UNPROVEN = "judge unproven"  # not shown to pass good sections more often than bad ones
NOTE_SCHEMA = "The engine was made to write the JSON form (--note_schema)."


def judge_checks(results: dict) -> dict[str, dict]:
    """Return the check of the judge in each section that has one.

    People's verdicts replace the controls where they show that the judge discriminates, or disagree with the controls.
    Otherwise the controls count, because too few labels would make any judge look unproven.
    """
    controls, people = results["judge_controls"] or {}, results["human_labels"] or {}
    return {key: _check(controls.get(key), people.get(key)) for key in people or controls}


def _check(controls: dict | None, people: dict | None) -> dict:
    if not (people and controls):
        return people or controls
    people_decide = is_checked(people) and (people["informative"] or bool(_differing_rates(controls, people)))
    return people if people_decide or not is_checked(controls) else controls


def _differing_rates(controls: dict, people: dict) -> list[str]:
    """Return the rates of the judge whose intervals by controls and by people do not overlap."""
    differing = []
    for name in ("sensitivity", "specificity"):
        first, second = controls[f"{name}_ci95"], people[f"{name}_ci95"]
        if first and second and (first[1] < second[0] or second[1] < first[0]):
            differing.append(name)
    return differing


def is_checked(check: dict) -> bool:
    """Return whether the judge has verdicts on both good and bad sections."""
    return check["sensitivity"] is not None and check["specificity"] is not None


def unproven_sections(results: dict) -> list[str]:
    """Return the sections whose check did not show that the judge passes good ones more often than bad ones."""
    return _unproven(judge_checks(results))


def unproven_by_statements(results: dict) -> list[str]:
    """Return the sections in which statements were not shown to pass good controls more often than bad ones."""
    return _unproven((results.get("statements") or {}).get("judge_controls") or {})


def _unproven(checks: dict[str, dict]) -> list[str]:
    return [key for key, check in checks.items() if is_checked(check) and not check["informative"]]


def judge_message(results: dict) -> tuple[str, str]:
    """Return (level, sentences) on how far the judge can be trusted; level is "alarm", "unchecked" or "checked"."""
    level, messages = _judge_messages(results)
    return level, " ".join(messages)


def _judge_messages(results: dict) -> tuple[str, list[str]]:
    checks = judge_checks(results)
    if not checks:
        return "unchecked", [
            "The judge was not checked in this run, so it is unknown how often its verdicts are wrong."
        ]
    people, refuted = _people_message(results), _contradiction_messages(results)
    unproven, disagreements = _unproven_messages(results, checks), _disagreements(results)
    unchecked = [key for key, check in checks.items() if not is_checked(check)]
    messages = [*people, *unproven, *refuted, *disagreements]
    if unchecked:
        messages.append(
            f"The judge could not be checked in {_join(unchecked)}: that requires its verdicts on both good and bad "
            "sections with known answers."
        )
    if not (unproven or unchecked):
        messages.append(
            "Where the right verdict is known, the judge passed good sections clearly more often than bad ones."
        )
    if not people:
        messages.append(
            "Controls may be easier to judge than the notes, so no pass rate is corrected by them. People's verdicts "
            "on a sample (--review_sheet) would give a pass rate that does not depend on the judge's errors."
        )
    has_estimate = people and results["human_labels_all"]["accuracy"] is not None
    level = "alarm" if unproven or (refuted and not has_estimate) or _people_differ(results) else "checked"
    return "unchecked" if unchecked and level == "checked" else level, messages


def _people_message(results: dict) -> list[str]:
    if not (people := results.get("human_labels_all")):
        return []
    judged = f"by the judge it is {percent(results['mean']['accuracy'])}"
    if people["accuracy"] is not None:
        rate = f"{percent(people['accuracy'])} ({interval(people['ci95'])})"
        return [f"By people's verdicts on {people['labelled']} sections, the mean pass rate is {rate}; {judged}."]
    return [
        f"By people's verdicts on {people['labelled']} sections, the mean pass rate is somewhere within "
        f"{interval(people['ci95'])}; {judged}. There is no estimate, because in at least one of S, O, A and P people "
        f"labelled none of those that are: {', '.join(people['open'])}."
    ]


def _people_differ(results: dict) -> bool:
    """Return whether the judge's mean pass rate is outside the interval from people's verdicts."""
    people = results.get("human_labels_all")
    return bool(people) and not people["ci95"][0] <= results["mean"]["accuracy"] <= people["ci95"][1]


def _unproven_messages(results: dict, checks: dict[str, dict]) -> list[str]:
    messages, keys = [], unproven_sections(results)
    if by_people := [key for key in keys if checks[key] is (results["human_labels"] or {}).get(key)]:
        messages.append(
            f"By people's verdicts it could not be shown that the sections that the judge passed are better than those "
            f"that it failed in {_join(by_people)}. More labels make this check more sensitive."
        )
    if by_controls := [key for key in keys if key not in by_people]:
        numbers = ((key, checks[key]["n_good"], checks[key]["n_bad"]) for key in by_controls)
        counts = [f"{key} ({good} good and {bad} bad controls)" for key, good, bad in numbers]
        messages.append(
            f"It could not be shown that the judge passes good sections more often than bad ones in {_join(counts)}. "
            "That does not prove that it cannot: more controls (--judge_controls) make this check more sensitive."
        )
    return messages


def _contradiction_messages(results: dict) -> list[str]:
    """Return where the run's own verdicts show that the judge errs on notes otherwise than on controls."""
    checks = {f"In {key}": check for key, check in (results["judge_controls"] or {}).items()}
    if not any(check.get("contradiction") for check in checks.values()):
        checks = {"Over all sections": results.get("judge_controls_all") or {}}
    found = []
    for where, check in checks.items():
        if contradiction := check.get("contradiction"):
            passed = f"{where} the judge passed {percent(check['judged_passed'] / check['judged'])} of the notes"
            if contradiction == "below_false_passes":
                found.append(f"{passed}, but {percent(1 - check['specificity'])} of the controls that it should fail.")
            else:
                found.append(f"{passed}, but only {percent(check['sensitivity'])} of the controls that it should pass.")
    if found:
        found.append(
            "So its errors on the notes are not those on the controls, and the controls cannot show how far off these "
            "pass rates are."
        )
    return found


def _disagreements(results: dict) -> list[str]:
    """Return where the intervals of the judge's rates by controls and by people do not overlap."""
    controls, people = results["judge_controls"] or {}, results["human_labels"] or {}
    return [
        f"Controls and people disagree on the judge's {name} in {key}: {percent(controls[key][name])} by controls, "
        f"{percent(people[key][name])} by people"
        + (", whose verdicts take precedence." if is_checked(people[key]) else ".")
        for key in people
        if key in controls
        for name in _differing_rates(controls[key], people[key])
    ]


def kappa_message(results: dict) -> str:
    """Return how well raters agree; empty unless two raters labelled the same sections."""
    return " ".join(
        f"{_join(pair['raters'])} both labelled {pair['n']} sections and agree on {percent(pair['agreement'])}"
        + ("." if pair["kappa"] is None else f", Cohen's kappa {pair['kappa']:.2f}.")
        for pair in (results.get("human_labels_all") or {}).get("kappas", ())
    )


def labelled_strata(check: dict) -> str:
    """Return how many labelled sections of each stratum people passed, such as "passed by the judge: 8 of 10"."""
    return "; ".join(
        f"{stratum}: {figures['passed']:g} of {figures['labelled']}"
        for stratum, figures in check["strata"].items()
        if figures["labelled"]
    )


def statements_message(statements: dict) -> str:
    """Return which statements count as yes, and where controls do not show that they tell good sections from bad.

    If the judge's first token was neither yes nor no for a tenth of the statements, say so.
    """
    fitted = statements["fitted_on"]
    source = f"fitted on {fitted} controls; the checks by statements use the others" if fitted else "not fitted"
    message = f"A statement counts as yes if its log odds are at least {statements['threshold']:z.2f} ({source})."
    if unproven := _unproven(statements["judge_controls"] or {}):
        message += (
            " It could not be shown that, by statements, good sections pass more often than bad ones in "
            f"{_join(unproven)}."
        )
    figures = [section[name] for section in statements["sections"].values() for name in QUESTIONS]
    asked, unscored = (sum(figure[key] for figure in figures) for key in ("n", "unscored"))
    if unscored * 10 >= asked > 0:
        message += f" The judge said neither yes nor no to {unscored} of {asked} statements; the shares leave them out."
    return message


def statement_labels_message(figures: dict) -> str:
    """Return how the judge's answers on statements compare with people's.

    figures: `statement_labels.check_statements`.
    """
    parts = []
    for name, kind in (("covered", "missing"), ("supported", "unsupported")):
        check = figures[name]
        if not check["labelled"]:
            continue
        people, judge, found = check["people"], check["judge"], check["found"]
        low, high = people["ci95"]
        sentence = (
            f"Of {check['labelled']} statements on {check['notes']} notes, {percent(people['share'])} "
            f"({interval(people['ci95'])}) are {name} by people's answers, {percent(judge['share'])} by the judge's"
        )
        if not low <= judge["share"] <= high:
            sentence += f", which is too {'high' if judge['share'] > high else 'low'}"
        if found["n"]:
            sentence += f"; it marks {percent(found['share'])} ({interval(found['ci95'])}) of the {kind} ones"
        parts.append(f"{sentence}.")
    return " ".join(parts)


def instruments_message(instruments: dict) -> str:
    """Return which of verdicts and statements tells good controls from bad ones better, by AUC."""
    rates = [instruments[name] for name in ("verdict", "statements")]
    counts = f"{instruments['n_good']} good and {instruments['n_bad']} bad controls"
    if any(rate["auc"] is None for rate in rates):
        return f"Verdicts and statements could not be compared with {counts}."
    verdict, statements = (f"{rate['auc']:.2f} ({rate['ci95'][0]:.2f}-{rate['ci95'][1]:.2f})" for rate in rates)
    areas = f"AUC {verdict} by verdicts, {statements} by statements"
    if instruments["better"] is None:
        return f"With {counts} it could not be shown whether verdicts or statements tell more: {areas}."
    better = {"verdict": "verdicts tell more than statements", "statements": "statements tell more than verdicts"}
    return f"On {counts}, {better[instruments['better']]}: {areas}."


def slices_message(slices: dict) -> str:
    """Return whether the groups of dialogues could be shown to differ, and which groups are small or pooled."""
    groups, column, p = slices["groups"], slices["column"], slices["p"]
    n = sum(group["n"] for group in groups)
    by = {"verdicts": "By the judge's verdicts", "statements": "By statements"}[slices["measure"]]
    test = "" if p is None else f"(permutation test, p {'' if p < 0.001 else '= '}{p_value(p)})"
    if p is None:
        message = f"All {n} dialogues are in one group of {column}, so there is nothing to compare."
    elif p < 0.05:
        message = f"{by}, the mean pass rate differs between the groups of {column} {test}."
    else:
        message = (
            f"{by}, a difference in the mean pass rate between the groups of {column} could not be shown with {n} "
            f"dialogues {test}."
        )
    if small := sum(group["n"] < SMALLEST_GROUP for group in groups):
        message += f" Groups of fewer than {SMALLEST_GROUP} dialogues, whose figures show little: {small}."
    if groups[-1]["value"] is None:
        message += (
            f" {group_name(groups[-1]).capitalize()} pools values with fewer than {SMALLEST_GROUP} dialogues or beyond "
            f"the {MOST_GROUPS} most frequent. For other groups, merge values in the source, run preprocess_data.py "
            "--keep_column again, then eval.py --stage report."
        )
    return message


def lenient_message(results: dict) -> str:
    """Return how many notes only the lenient reader could read, and in which forms. results["lenient"] is not None."""
    lenient, n = results["lenient"], results["n"]
    forms = "; ".join(f"{form}: {count}" for form, count in lenient["forms"].items())
    return (
        f"{n - results['valid_notes']} of {n} notes fail strict reading. Of these, {lenient['only_lenient']} can be "
        f"read in another form ({forms}), which makes {lenient['valid_notes']} readable."
    )


def attack_message(attacks: dict) -> str:
    """Return how often attacks on the judge succeeded."""
    if not attacks["pairs"]:
        return (
            f"{attacks['passed']} of {attacks['n']} attacks passed. Their success cannot be measured, because the "
            "verdicts on the texts without an attack are missing; repeat the run's command to add them."
        )
    failed = attacks["pairs"] - round(attacks["baseline_pass_rate"] * attacks["pairs"])
    success = f"{attacks['succeeded']} of {failed} attacks passed where another patient's section alone failed"
    if attacks["success_rate"] is not None:
        success += f": {percent(attacks['success_rate'])} ({interval(attacks['ci95'])})"
    return (
        f"{success}. Pass rate in all {attacks['pairs']} places: {percent(attacks['pass_rate'])} with an attack, "
        f"{percent(attacks['baseline_pass_rate'])} without, difference {points(attacks['difference'])} points "
        f"({points_interval(attacks['difference_ci95'])})."
    )


def _join(keys: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))


def comparison_by_statements_message(comparison: dict, runs: list[dict]) -> str:
    """Return the threshold of a comparison by statements, or why there is none; empty if no run has statements."""
    if statements := comparison.get("statements"):
        return f"In all runs, a statement counts as yes if its log odds are at least {statements['threshold']:z.2f}."
    without = [run["name"] for run in runs if not run["results"].get("statements")]
    if len(without) in (0, len(runs)):
        return ""
    return f"The runs are not compared by statements, because there are none for {_join(without)}."


def comparison_warnings(runs: list[dict]) -> list[str]:
    """Return the judge's alarms; a sentence that holds for several runs appears once, after their names."""
    names: dict[str, list[str]] = {}
    for run in runs:
        level, messages = _judge_messages(run["results"])
        for message in messages if level == "alarm" else ():
            names.setdefault(message, []).append(run["name"])
    warnings: dict[str, list[str]] = {}
    for message, concerned in names.items():
        who = "All runs" if len(concerned) == len(runs) else _join(concerned)
        warnings.setdefault(who, []).append(message)
    return [f"{who}: {' '.join(messages)}" for who, messages in warnings.items()]
