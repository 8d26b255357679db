"""The numbers in the text of the pages. `quotes` computes each from the committed results, so that none is typed twice.

A number that looks measured and is in no quote of its page needs a link in its paragraph: to a page of results that has a quote with
the same words ("1.5 to 1.6 times"), to the page of the log that has the number, or to a paper.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# Not here: the diary, two pages that are made, and three whose numbers are versions, formats and rules.
ELSEWHERE = {f"docs/{name}.md" for name in ("api", "cli", "compared", "other-runtimes", "packed-format")}
WRITTEN = [path for folder in ("docs", "docs/results") for path in (ROOT / folder).glob("*.md")]
PAGES = sorted({"README.md", *(str(path.relative_to(ROOT)) for path in WRITTEN)} - ELSEWHERE)
GENERATED = re.compile(r"<!-- \w+: made.*?<!-- /\w+ -->", re.DOTALL)
START, WHOLE, END = r"(?<![\w.,/`^-])", r"\d+(?:,\d{3})*", r"(?!\.?\d|[\w-]| billion)"
NUMBER = rf"{START}{WHOLE}(?:\.\d+)?{END}"
LIST = rf"{NUMBER}(?:(?:,| and| to| or| ±|, then) {NUMBER})*"
SETTING = re.compile(rf"(?:\b(?:[Aa]t|[Bb]elow|[Aa]bove) |^\| ){LIST} (?:%|and more)|[=≥] {LIST}|{LIST} bits")
UNIT = r"(?:×(?! ?\d)|times\b|%|[MG]B\b|tokens/s|minutes?\b|hours?\b|seconds?\b|ms\b|s\b)"
MEASURED = re.compile(rf"{LIST} ?{UNIT}|{START}{WHOLE}\.\d+{END}")
BOTH = ["wiki", "wikitext-2.tokenised.valid.txt"]
OWL = "official-owl-sparsegpt-70"


@cache
def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def result(name):
    return json.loads(page(f"benchmarks/results/{name}.json"))


def cell(file, name, what="kl"):
    """One measure on each text."""
    return np.array([text[what] for text in result(file)["cells"][name]["texts"].values()])


def values(file, key, *names):
    return np.array([result(file)["cells"][name][key] for name in names])


def table(name, column, rows):
    """The numbers of a column in the generated tables of a page of results, in the rows that begin so."""
    found, head = [], []
    for line in "\n".join(GENERATED.findall(page(f"docs/results/{name}.md"))).splitlines():
        row = [some.replace("*", "").strip() for some in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = row
        elif column in head and re.match(rows, " | ".join(row)):
            found += re.findall(r"^[\d,.]+", row[head.index(column)])
    return np.array([float(some.replace(",", "")) for some in found])


def less(some, others):
    """How many per cent."""
    return 100 * (1 - np.asarray(some) / np.asarray(others))


def ends(values):
    return np.min(values), np.max(values)


def times(name):
    """Perplexity of 1.5 billion weights, in times of the dense one, on four texts."""
    return cell("evidence", name, "perplexity") / cell("evidence", "dense", "perplexity")


def fewer(name, other, what="kl"):
    return less(cell("evidence", name, what), cell("evidence", other, what))


def trained(name, *sparsities):
    """Perplexity in times of the dense one, of each sparsity on the trained text, then on the other."""
    return np.array([table("recovery", "× dense", rf"{some} . {name} . ") for some in sparsities]).T


def mixed(name):
    """Perplexity in times of the dense one, on wiki, WikiText-2, documentation and code."""
    return cell("recovery_texts", name, "perplexity") / cell("recovery_texts", name, "dense")


def members(solver, sparsity, pattern="channels.heads"):
    """Perplexity of SmolLM2 and of Qwen2.5-Coder-1.5B under `uniform`, on both texts each."""
    return table("structured", f"{sparsity}%", rf"{pattern} . {solver} . uniform ")


def unpruned(name):
    """Perplexity of the dense models of a page of results, on both texts each."""
    return np.array(re.findall(r"dense \*\*([\d.]+)", page(f"docs/results/{name}.md")), float)


def beside(ours, theirs, cpu, key="decode"):
    """How many times as fast our whole rows of a kind are as a type of llama.cpp, of each shape on CPUs of that name."""
    rows = result("few_bits_speed")["rows"]
    speed = {(row["cpu"], row["shape"], row["name"]): row[f"{key}_tokens_per_second"] for row in rows}
    places = [
        place for place in speed if re.search(cpu, place[0]) and re.fullmatch(rf"{ours}:\d+:0", place[2])
    ]
    return [speed[place] / speed[(*place[:2], theirs)] for place in places if (*place[:2], theirs) in speed]


@cache
def quotes():
    """By page, what its text must say, `#` for each number. A quote without numbers must be true."""
    # fmt: off
    fit, llama = ["fit:5", "fit:4.13", "fit:3.38"], ["llama:Q4_K_M", "llama:Q3_K_M", "llama:Q2_K"]
    f, q, e, b, bq = "frontier", "frontier_qwen", "evidence", "few_bits", "few_bits_qwen"
    leads = {file: [100 * values(file, key, name)[0] for name in names for key in ("lead", "lead_stderr")] for file, names in ((q, fit), (f, ["fit:3.5", "fit:3", "fit:2.5"]))}
    speeds = result(q)["speeds"]["cells"]
    decode, prefill = (np.array([speeds[one][key] / speeds[other][key] for one, other in zip(fit, llama, strict=True)]) for key in ("decode_tokens_per_second", "prefill_tokens_per_second"))
    gguf, gguf2 = (ends(cell("gguf_qwen", f"fit:{one}") / cell("gguf_qwen", f"llama:{one}")) for one in ("Q3_K_M", "Q2_K"))
    megabytes = {name: some["bytes"] / 1e6 for file in (f, q, e) for name, some in result(file)["cells"].items()}
    small = values(f, "bytes", "fit:6", "llama:Q4_K_M", "fit:4", "llama:Q2_K") / 1e6
    zeros = [cell(file, f"int3:64:0 {solver} 0") / cell(file, f"{half} {solver} 0") for file, half in ((b, "int4:64:0.5"), (bq, "int4:32:0.5")) for solver in ("sparsegpt", "alps")]
    error, l1, outliers = (less(cell("mixed_bits", f"{name} 0"), cell("mixed_bits", "uniform 0")) for name in ("error", "l1", "owl"))
    fast8, dense8 = result(e)["cells"]["fast:0.5:int8"], result(e)["cells"]["dense"]
    by = {name: table("allocators", name, r"\w+ . \d+%") for name in ("uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend", "auto")}
    papers = np.array([by[name][:18] for name in by if name not in ("uniform", "blend", "auto")])
    lost = {solver: {name: table("encoders", solver, rf"\d+% . {name} ") for name in ("uniform", "er", "er-plus", "global", "owl", "alpha", "atp")} for solver in ("magnitude", "wanda", "sparsegpt", "alps")}
    recipe = {name: np.array([table("recipes", f"{some}%", rf"{name} . [\d,]+\.") for some in (50, 60, 70)]) for name in (OWL, "fast", "fast, blended and refined")}
    took = {name: np.array([table("recipes", f"{some}%", rf"{name}, Intel")[0] for some in (50, 60, 70)]) for name in recipe}
    lower, refined = less(recipe["fast"], recipe[OWL]), less(recipe["fast, blended and refined"], recipe["fast"])
    of_owl, of_fast = (recipe[name][:, :2] / unpruned("recipes")[:2] for name in (OWL, "fast"))
    slim, whole = (result("structured_qwen")["speed"]["models"][some]["tokens_per_second"] for some in ("slim", "dense"))
    slimmer = {some: (members("obs", some) / unpruned("structured")).reshape(2, 2) for some in (20, 30)}
    auto, same = ([result("structured")["cells"][f"allocator={some} pattern=channels+heads seed=0 solver=obs sparsity=0.4"]["evaluation"][text]["perplexity"] for text in BOTH] for some in ("auto", "uniform"))
    served = {(row["cpu"].split()[0], row["shape"], row["variant"], row["requests"]): row["served_tokens_per_second"] for row in result("serving")["measurements"]}
    peer = {(cpu, count): [served[(cpu, "1.1b", own, count)] / served[(cpu, "1.1b", f"llama.cpp {other}", count)] for own, other in (("int4", "Q4_0"), ("int3", "Q3_K_M"))] for cpu in ("AMD", "Intel(R)") for count in (1, 8)}
    top1 = [100 * cell(q, name, "top1") for name in fit]
    return {
        "README.md": {
            "[# to # times its KL divergence]": gguf,
            "had # to # % less divergence than equal ones at 50 %, and # to # % less at 60 %": [ends(fewer(f"{OWL}:{some}", f"sparsegpt:{some}")) for some in (0.5, 0.6)],
            "from # to # times the original's perplexity": (times("best:0.5")[0], times("recovered:60:int8")[0]),
            "Of [# families tried](docs/models.md) as tiny models, # can be pruned and # decode packed": list(map(int, re.findall(r"(\d+) (?:were tried|are pruned|decoded)", page("docs/models.md")))),
        },
        "docs/decision-guide.md": {"[# to # %](results/frontier": ends(top1[0]), "in # % |": top1[1][0], "in # to # % |": ends(top1[2])},
        "docs/gguf.md": {"has # to # times the KL": gguf, "and # to # times that of Q2_K": gguf2},
        "docs/why-not-faster.md": {
            "| packed bf16 | 2 × density + 1/8 | # × | # × | # × | # × |": [2 / (2 * d + 1 / 8) for d in (0.5, 0.4, 0.3, 0.2)],
            "| packed int8 | density + 1/8 | # × | # × | # × | # × |": [2 / (d + 1 / 8) for d in (0.5, 0.4, 0.3, 0.2)],
        },
        "docs/serving.md": {"All # of their answers were right. Memory grew by # %. The server ended # seconds": (result("soak")["seen"]["well-behaved: right"], 100 * result("soak")["growth"], result("soak")["seconds_to_end"])},
        "docs/results/allocators.md": {
            "`atp` is the best of the papers' allocators in all nine rows": by["atp"][:9] == papers[:, :9].min(0),
            "`alpha` is the best of them in eight rows of nine": (by["alpha"][9:18] == papers[:, 9:].min(0)).sum() == 8,
            "`er`, `er-plus` and `global` are worse than `uniform` in every row": [by[some] > by["uniform"][:18] for some in ("er", "er-plus", "global")],
            "A search is better than `uniform` in all eighteen rows": by["auto"][:18] < by["uniform"][:18],
            "beats the best single allocator in eight of nine on `wiki`": (by["auto"][:9] < np.min([by[some][:9] for some in by if some != "auto"], 0)).sum() == 8,
            "It takes # to # times as long as one prune": ends(np.divide(*(table("allocators", some, r"\w+, AMD|sparsegpt . \d+ ") for some in ("auto", "uniform")))),
            "on Gemma no allocator but `atp` beats `uniform` on `wiki`": [(by[some][18:21] < by["uniform"][18:21]).any() == (some == "atp") for some in ("owl", "dlp", "alpha", "atp", "blend")],
        },
        "docs/results/cost.md": {
            "the peaks are # GB with Wanda and # GB with SparseGPT": table("cost", "peak memory", "7B"),
            "prunes # and # times as fast as the official flow**, by our transcription of it, in # and # times the memory": [
                [row[what] for row in result("prune_speed")["rows"]] for what in ("times_faster", "memory_ratio")
            ],
            "# to # times as long as SparseGPT": ends(table("cost", "× SparseGPT", ".*alps")),
            "are # to # times as fast as one": ends(table("cost", "times faster", r"\w+, \w+ . 2 ")),
        },
        "docs/results/decoding.md": {"packed bf16 decodes # to # times as fast as our dense model, and packed int8 # to # times": [ends(table("decoding", "× dense, tuned", rf"packed {some} . 70%")) for some in ("bf16", "int8")]},
        "docs/results/encoders.md": {
            "On the sentence encoder no allocator lost less energy than uniform, at 50 to 80 % and under four solvers": [some[name][:4] >= some["uniform"][:4] for some in lost.values() for name in some],
            "OWL lost # to # times as much": ends([some["owl"][:4] / some["uniform"][:4] for some in lost.values()]),
            "`er` lost # % less than uniform, and OWL # % less": [less(lost["sparsegpt"][some], lost["sparsegpt"]["uniform"])[4] for some in ("er", "owl")],
            "Under `alps` at 70 % OWL lost # % less": less(lost["alps"]["owl"], lost["alps"]["uniform"])[5],
            "loses # % of what Wanda loses on the sentence encoder, and # % on the vision transformer": 100 * (lost["alps"]["uniform"] / lost["wanda"]["uniform"])[[1, 4]],
        },
        "docs/results/few-bits.md": {
            "the column loop has # to # of rounding's KL with `int4` in groups of 32, and ADMM # to #": [ends(cell(b, f"int4:32:0 {some} 0") / cell(b, "int4:32:0 magnitude 0")) for some in ("sparsegpt", "alps")],
            "has # to # % of the KL of `int4` with half": ends(100 * np.array(zeros)),
            "1.5 billion weights have # % of SmolLM2's KL": 100 * cell(bq, "int3:64:0 magnitude 0")[0] / cell(b, "int3:64:0 magnitude 0")[0],
            "have # and # % less KL than equal ones, and bits shared by OWL # and # % less": (error, outliers),
            "`error` has # and # % less KL than `uniform` on the two texts, `l1` # and # % less": (error, l1),
            "the loop has # and # % of rounding's KL": 100 * cell(bq, "int4:32:0 sparsegpt 0") / cell(bq, "int4:32:0 magnitude 0"),
            "takes # to # × its size with bf16": ends([(d + 1 / 8) / (2 * d + 1 / 8) for d in (0.5, 0.3)]),
        },
        "docs/results/frontier.md": {
            "#, # and # % of their KL** on `wiki`, and #, # and # % on WikiText-2": 100 * np.array([cell(q, one) / cell(q, other) for one, other in zip(fit, llama, strict=True)]).T,
            "It decodes #, # and # times as fast": decode,
            "a fit of # MB has # % of the KL of Q4_K_M with an importance matrix** (# MB), and one of # MB has less than Q2_K (# MB)": (small[0], 100 * cell(f, "fit:6")[0] / cell(f, "llama:Q4_K_M")[0], small[1:]),
            "is # ± #, # ± # and # ± # % below that of the best single kind": leads[q],
            "cost # times the KL of `int3` without zeros, in # times its bytes": (cell(f, "bf16::0.5")[0] / cell(f, "int3:32:0")[0], megabytes["bf16::0.5"] / megabytes["int3:32:0"]),
            "[# to # times its KL](../log/gguf.md), and at those of Q2_K # to # times": [*gguf, *gguf2],
            "their KL is # ± #, # ± # and # ± # % below": leads[f],
            "`--bits 5` reads them # % slower than Q4_K_M, `--bits 4.13` # % slower than Q3_K_M, and `--bits 3.38` # % faster": abs(100 - 100 * prefill),
        },
        "docs/results/llama-cpp.md": {
            "With AVX-512 `int4` decodes # to # times as fast as Q4_0, and `int3` # and # times as fast as Q3_K_M": (ends(beside("int4", "Q4_0", "avx512vbmi2$")), beside("int3", "Q3_K_M", "avx512vbmi2$")),
            "With AVX-VNNI they are # to # and # times as fast": (ends(beside("int4", "Q4_0", "avxvnni")), *beside("int3", "Q3_K_M", "avxvnni")),
            "With AVX2 alone `int4` decodes # to # times as fast as Q4_0 on the shape of 1.1B, and # times on 7B. `int3` is # and # times as fast as Q3_K_M": (ends(beside("int4", "Q4_0", "AMD")), *beside("int4", "Q4_0", "Intel.*avx2$"), beside("int3", "Q3_K_M", "AMD")),
            "They read prompts # to # times as fast as Q4_0 with AVX-512, # to # times with AVX-VNNI, and # to # times with AVX2": [ends(beside("int.", "Q4_0", cpu, "prefill")) for cpu in ("avx512vbmi2$", "avxvnni$", "avx2$")],
        },
        "docs/results/one-linear.md": {
            "packed bf16 reaches # to # % of what memory streams": ends(table("one-linear", "of the limit", "[567]0%")),
            "Our dense bf16 reaches # to # %": ends(list(map(int, re.findall(r"dense bf16 at (\d+)%", page("docs/results/one-linear.md"))))),
            "packed bf16 is # and # times as fast as our dense bf16": table("one-linear", "packed bf16 × our dense bf16", "70%"),
            "packed bf16 is # to # times as fast": ends([table("one-linear", some, "[578]0%") for some in ("64", "96", "128", "256", "512")]),
        },
        "docs/results/owl.md": {
            "At 70 % OWL beats uniform and its own opposite": [table("owl", text, "owl .")[0] < table("owl", text, some)[0] for text in BOTH for some in ("uniform", "owl reversed")],
            "One ratio for each block is better than one for each module or linear": [table("owl", text, "block") < table("owl", text, some) for text in BOTH for some in ("module", "linear")],
        },
        "docs/results/qwen.md": {
            "At 50 % the default has # to # times the dense perplexity": ends(times("default:0.5")),
            "on four texts**, with # to # % less KL than `-c fast`": ends(fewer("default:0.5", "fast:0.5")),
            "At 60 % the default has # to # times the dense perplexity**, with # to # % less KL than `-c fast`": (ends(times("default:0.6")), ends(fewer("default:0.6", "fast:0.6"))),
            "It asks the output, and took # minutes": values(e, "seconds", "default:0.5") / 60,
            "At 50 % `-c fast` has # to # times the dense perplexity, and at 60 % # to # times": [ends(times(f"fast:{some}")) for some in (0.5, 0.6)],
            "have # to # % less KL than equal ones at 60 %**, and # to # % less at 50 %": [ends(fewer(f"{OWL}:{some}", f"sparsegpt:{some}")) for some in (0.6, 0.5)],
            "`-c fast` has # to # % less than OWL at 60 %": ends(fewer("fast:0.6", f"{OWL}:0.6")),
            "it decodes # times as fast as our tuned dense model**, in # % of the bytes": (fast8["decode_tokens_per_second"] / dense8["decode_tokens_per_second"], 100 * fast8["bytes"] / dense8["bytes"]),
            "has a KL of # on WikiText-2 in # MB, and this model # in # MB": [(cell(file, name)[1], megabytes[name]) for file, name in ((q, "fit:4.13"), (e, "fast:0.5:int8"))],
            "brings back # to # % of the lost log-perplexity": ends(less(np.log(times("recovered:60")), np.log(times("best:0.5")))),
            "it has # to # times the dense perplexity": ends(times("2:4")),
            "There fewer next tokens agree with the dense model on three of four texts": sum(fewer(f"{OWL}:0.5", "sparsegpt:0.5", "top1") > 0) == 3,
            "`-c fast` took # to # times as long": ends(values(e, "seconds", "fast:0.5", "fast:0.6") / values(e, "seconds", f"{OWL}:0.5", f"{OWL}:0.6")),
            "from # to # times the dense perplexity to # to # times": (ends(times("best:0.5")), ends(times("recovered:60"))),
            "the refined model has # %, after the hour # %, and the dense model # %": 100 * values(e, "mean", "best:0.5", "recovered:60", "dense"),
        },
        "docs/results/recipes.md": {
            "it is # to # % lower on `wiki`, and # to # % on the other text": [ends(lower[:, i]) for i in (0, 1)],
            "# to # % below `fast` on `wiki`, and # to # % on the other text, for # to # times its time": [*(ends(refined[:, i]) for i in (0, 1)), ends(took["fast, blended and refined"] / took["fast"])],
            "On Gemma at 70 % it is # % higher than `fast` on the other text": -refined[2, 3],
            "| 50 % | SmolLM2-135M has # to # × the dense perplexity with OWL and SparseGPT, and # × by `-c fast`": (ends(of_owl[0]), of_fast[0, 0]),
            "| 60 % | SmolLM2-135M has # to # × with OWL and SparseGPT, and # to # × by `-c fast`": (ends(of_owl[1]), ends(of_fast[1])),
            "| 70 % | SmolLM2-135M has # to # × with OWL and SparseGPT, and # to # × by `-c fast`": (ends(of_owl[2]), ends(of_fast[2])),
            "takes # to # × the time of OWL with SparseGPT on SmolLM2": ends(took["fast"] / took[OWL]),
        },
        "docs/results/recovery.md": {
            "half an hour brings SmolLM2 to # times the dense perplexity at 50 %**, and to # times at 60 %. On another text that is # and # times": trained("recovered, 30 min", "50%", "60%"),
            "**: # and # times on the trained text, # and # times on the other": trained("recovered, 10 min", "50%", "60%"),
            "The dense model, trained alike for half an hour, has # and # times": trained("control, 30 min", "–"),
            "SmolLM2 has # times its dense perplexity on Python's documentation and # times on code": mixed("wiki 0.5 one-shot 0 0")[2:],
            "With it the model has # and # times": mixed("mixed 0.5 one-shot 0 0")[2:],
            "# and # times on the documentation and on code. As many tokens of Wikipedia bring the model calibrated on it to # and # times": [mixed(f"{some} 0.5 distill 0.5 100000")[2:] for some in ("mixed", "wiki")],
            "took # minutes of one core": values("recovery_texts", "seconds", "mixed 0.5 distill 0.5 330000") / 60,
            "They bring the model to # to # times on the four texts. The dense model, trained alike (*control*), has # to # times": [ends(mixed(f"mixed {some} 0.5 330000")) for some in ("0.5 distill", "0 control")],
            "leaves # to # times the dense perplexity. The same tokens bring it to # to # times": [ends(mixed(f"mixed 0.7 {some}")) for some in ("one-shot 0 0", "distill 0.5 100000")],
        },
        "docs/results/serving.md": {
            "Eight requests get # to # times the tokens of one": ends([count / served[(*place, name, 1)] for (*place, name, requests), count in served.items() if requests == 8 and "llama" not in name]),
            "its first token takes # to # s instead of # to # s": [ends(np.concatenate([table("serving", some, "(?!llama).* 1 ") for some in columns])) for columns in (["again"], ["first token of 512", "first token of 2,000"])],
            "# tokens/s where `int4` has #": [served[("AMD", "1.1b", some, 1)] for some in ("llama.cpp Q4_0", "int4")],
            "`int4` makes # times as many as Q4_0, and `int3` # times as many as Q3_K_M": peer["AMD", 8],
            "eight requests get # times the tokens of Q4_0 from `int4`, and # times those of Q3_K_M from `int3`. One request gets # and # times": peer["Intel(R)", 8] + peer["Intel(R)", 1],
        },
        "docs/results/solvers.md": {
            "ALPS has the lowest perplexity of all that are not refined**, but for WikiText-2 at 50 %, where refitted RIA is": np.equal([table("solvers", f"{some}%", r"\w+( . refit)? \| .*±").reshape(2, 7).argmin(1) for some in (50, 60, 70)], [[6, 3], [6, 6], [6, 6]]),
            "# % lower": less(*(table("solvers", "50%", rf"{some} \| .*±")[1] for some in ("ria . refit", "alps"))),
        },
        "docs/results/structured.md": {
            "`obs` loses least of the solvers**, at 20 and 30 %, under `uniform`, on both models and both texts": [members("obs", some) < members(other, some) for some in (20, 30) for other in ("flap", "wanda")],
            "SmolLM2 at 20 % has # and # times its dense perplexity": slimmer[20][0],
            "at 40 % its perplexity is # and # % below that of `uniform` with the same seed": less(auto, same),
            "Whole blocks lose more than channels and heads": members("divergence", 20, pattern="blocks") > members("obs", 20)[:2],
            "its perplexity is # and # % below that of `flap` on two texts. On Qwen2.5-Coder-1.5B, with one seed, that is # and # %": less(members("obs", 20), members("flap", 20)),
            "SmolLM2 has # and # times the dense perplexity at 20 %, and # and # times at 30 %. The 1.5-billion model has # and # times at 20 %, and # and # times at 30 %": [slimmer[some][i] for i in (0, 1) for some in (20, 30)],
            "It decodes # times as fast, and reads a prompt # times as fast": [slim[some] / whole[some] for some in ("decode", "prompt")],
        },
        "docs/results/tasks.md": {"errors of up to # %": max(map(float, re.findall(r", % \| \**\d+\.\d ± (\d\.\d)", page("docs/results/tasks.md"))))},
    }
    # fmt: on


def prose(name):
    """The text of a page, a line for each paragraph, item and row, without code and what is generated."""
    text = re.sub(r"^```.*?^```", "", GENERATED.sub("", page(name)), flags=re.DOTALL | re.MULTILINE)
    return "\n".join(
        " ".join(some.split()) for some in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\.) ?)", text)
    )


def quoted(quote, text):
    return re.search(f"({NUMBER})".join(map(re.escape, quote.split("#"))), text)


def linked(name, block):
    """What the pages say that a paragraph links to: pages of results in their quotes, pages of the log in all of it."""
    results = log = ""
    for link in re.findall(r"\]\(([\w./-]+\.md)", block):
        path = str((ROOT / name).parent.joinpath(link).resolve().relative_to(ROOT))
        found = [quoted(quote, prose(path)) for quote in quotes().get(path, {})]
        results += "\n".join(some[0] for some in found if some).replace("×", "times")
        log += page(path) if "/log/" in path else ""
    return results, log


def wrong(name, said):
    """What a page says otherwise than the results, and the numbers that nothing says."""
    text = prose(name)
    for quote, right in said.items():
        flat = np.concatenate(
            [np.ravel(some) for some in (right if isinstance(right, tuple | list) else [right])]
        )
        found = quoted(quote, text)
        shown = found.groups() if found else ()
        rounded = [
            f"{value:,.{len(some.partition('.')[2])}f}"
            for value, some in zip(flat, shown, strict=bool(shown))
        ]
        if not found or (list(shown) != rounded if shown else not flat.all()):
            yield f"{quote}: {flat} is not {shown}"
        text = text.replace(found[0] if found else quote, "…")
    for block in text.splitlines():
        bare, (results, log) = (
            SETTING.sub("…", re.sub(r"`[^`]*`|\]\([^)]*\)", "…", block)),
            linked(name, block),
        )
        for found in MEASURED.finditer("" if "https://arxiv.org" in block else bare):
            alone = r"(?<![\d.,]){}(?!\.?\d)".format
            in_log = re.search(".*?".join(map(alone, re.findall(NUMBER, found[0]))), log)
            if not in_log and not re.search(alone(re.escape(found[0].replace("×", "times"))), results):
                yield f"{found[0]} has no file: {bare[max(0, found.start() - 40) : found.end() + 20]}"


@pytest.mark.parametrize("name", PAGES)
def test_each_number_in_the_text_of_a_page_is_that_of_the_results(name):
    assert list(wrong(name, quotes().get(name, {}))) == []


def test_a_page_that_says_another_number_is_found(monkeypatch):
    monkeypatch.setitem(
        globals(), "page", lambda _: "It has 12 to 30 times, and 7 tokens/s. At 50 % it has a KL of 0.5."
    )
    found = [some.split(":")[0] for some in wrong("README.md", {"has # to # times": (12.4, 31)})]
    assert found == ["has # to # times", "7 tokens/s has no file", "0.5 has no file"]
