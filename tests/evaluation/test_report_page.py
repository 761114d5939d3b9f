"""report.html: nothing from outside, nothing that runs, nothing that a model wrote becomes markup; and in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from opcd_fast.evaluation.compare import as_markdown
from opcd_fast.evaluation.report import readme
from opcd_fast.evaluation.report.charts import score
from opcd_fast.evaluation.report.models import ARMS, BASE, SHOWN, STUDENT
from opcd_fast.evaluation.report.page import page

EVIL = "<script>document.title='owned'</script><img src=http://example.invalid/x onerror=alert(1)>&\"'</div></table>"


def estimate(value, low=None, high=None):
    return {"value": value, "low": value / 2 if low is None else low, "high": min(1.0, value * 1.5) if high is None
            else high, "n": 32, "interval": "bootstrap"}  # fmt: skip


def kl(value):
    return {**estimate(value, value / 2, value * 2), "p50": value / 3, "p90": value * 2, "p99": value * 5, "tokens": 99}


def example(prompt, shown, student, **more):
    return {"prompt": prompt, "answers": {SHOWN: shown, STUDENT: student}, **more}


@pytest.fixture
def card():
    """Made up, so that every part is there; real ones are in test_report.py."""
    arms = {arm: estimate(0.2 * (i + 1)) for i, arm in enumerate(ARMS)}
    gap = {"before": kl(0.8), "after": kl(0.06), "gap_closed": estimate(0.93)}
    greedy = {"identical": estimate(0.5), "first_difference": {"median": 3, "of": [3]}}
    worse = [example(f"prompt {i}", "good answer\nof two lines", EVIL, scores={SHOWN: 1, STUDENT: 0}) for i in range(3)]
    regressions = {"count": 3, "better": 1, "of": 32, "examples": worse}
    file = {"size": 1, "sha256": "ab" * 32}
    return {
        "schema": 1, "written": "2026-01-01T00:00:00+00:00", "run": EVIL, "base_model": EVIL, "adapter": True,
        "teacher_model": None, "warning": "No secrets.", "seconds": 12.0,
        "ran": {"device": EVIL, "dtype": "float32", "python": "3", "torch": "2", "transformers": "5", "peft": "0"},
        "measured_with": {"held_out_prompts": 32, "of": 128, "samples_per_prompt": 1, "seed": 0, "max_new_tokens": 24,
                          "temperature": 1.0, "top_p": 1.0},
        "kl": {"own": gap, "fixed": gap},
        "agreement": {"top1": {k: {"before": estimate(0.5), "after": estimate(0.9)} for k in ("own", "fixed")},
                      "greedy": {"before": greedy, "after": greedy}},
        "arms": {arm: {"length": estimate(12.0, 10, 14), "truncated": estimate(0.1)} for arm in ARMS},
        "scores": [{"name": EVIL, "kind": "regex", "arms": arms, "regressions": regressions}],
        "forgetting": {"kl": kl(0.3), "top1_agreement": estimate(0.8), "prompts": 32, "left_out_as_trained_on": 2},
        "saved": {"tokens_with_context": 197.0, "tokens_without": 37.0, "tokens": 160.0, "repeats": 5,
                  "prefill_seconds_with_context": 0.9, "prefill_seconds_without": 0.2, "prefill_seconds": 0.7,
                  "timed_tokens": {"with": 190, "without": 30}},
        "side_by_side": [{"prompt": EVIL, "answers": {BASE: "a base's", SHOWN: EVIL, STUDENT: "a student's"}}],
        "furthest": [example(EVIL, EVIL, "", kl=0.2)],
        "training": {"steps": [[s, 1.0 / s] for s in range(1, 31)], "evaluations": [[0, 0.9, 5.6], [30, 0.05, 0.06]]},
        "settings": {"learning_rate": 0.001, "stop_tokens": [EVIL]},
        "hashes": {"context_sha256": "c" * 64, "prompts_sha256": "d" * 64, "held_out_sha256": "e" * 64,
                   "tokenizer": {"name": "m", "files": {"tokenizer.json": file}, "template_sha256": "f" * 64},
                   "base": {"name": EVIL, "commit": None, "files": {EVIL: file}, "fingerprint": None}, "teacher": None,
                   "weights": {"adapter_model.safetensors": file}, "started": None,
                   "code": {"version": "0.1.0", "commit": None, "changed": None}},
    }  # fmt: skip


class Seen(HTMLParser):
    """Elements, their attributes and all text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_written_by_a_model_or_a_user_becomes_markup(card):
    html = page(card, [{"role": "user", "content": EVIL}])
    seen = Seen(html)
    assert not seen.open
    assert not {"script", "img", "iframe", "link", "object", "embed"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    # Every place where such a text goes: title and heading, subtitle, score (tile, chart, table, regression), ...
    assert "".join(seen.text).count("document.title='owned'") >= 12
    assert not [value for name, value in seen.attributes if "http" in (value or "") and name != "aria-label"]
    assert not re.search(r"url\(|@import|http", html[html.index("<style>") : html.index("</style>")])


def test_numbers_and_texts_are_there_or_said_not_to_be(card):
    text = " ".join("".join(Seen(page(card, "the context")).text).split())
    for words in ("No secrets.", "Lower in 3 of 32 cases", "2 others were trained on", "93% (46% to 100%)",
                  "0.800 (0.400 to 1.600)", "19737160", "900 ms", "differ first at token 4", "good answer of two lines",
                  "0.300"):  # fmt: skip
        assert words in text, words
    card.update(scores=[], forgetting=None, furthest=[], training={"steps": [], "evaluations": []})
    text = "".join(Seen(page(card, None)).text)
    for words in ("No behaviour was named", "Not measured", "No metrics were kept", "Each prompt brought its own"):
        assert words in text


def test_the_verdict_and_answers_come_first(card):
    card["scores"][0]["name"] = "the form"
    text = " ".join("".join(Seen(page(card, "Always   say zzz. " * 9)).text).split())
    verdict = "The student closed 93% of the distance to base + context on its own answers. the form: student 60%, "
    verdict += "base + context 40%, base 20%."
    order = ["Always say zzz. Always", verdict, "a base's", "a student's", "prompt tokens saved", "How far is it"]
    places = [text.index(words) for words in order]
    assert places == sorted(places) and f"{'Always say zzz. ' * 9}"[:59] in text
    assert verdict in readme(card)
    assert "a student's" not in readme(card) and "zzz" not in readme(card)


@pytest.mark.parametrize(
    ("value", "low", "words"),
    [(-0.06, -0.2, "It did not work"), (0.2, -0.1, "may be chance"), (0.3, 0.2, "It worked in part: "),
     (0.9, 0.8, "The student closed 90%")],
)
def test_a_run_that_did_not_work_says_so(card, value, low, words):
    card["kl"]["own"]["gap_closed"] = estimate(value, low, 0.95)
    assert words in readme(card) and words in page(card, None)


def test_sentences_of_the_readme_are_apart(card):
    card["ran"]["dtype"] = "bfloat16"
    card["saved"]["virtual_tokens"] = 4
    text = readme(card)
    assert "95% intervals. Computed in bfloat16" in text and "of the context). The trained prefix of 4" in text
    card["ran"]["dtype"] = "float32"
    assert "95% intervals.\n\n|" in readme(card)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e4])
def test_plots_stand_extreme_values(card, value):
    for key in ("own", "fixed"):
        card["kl"][key]["after"] = kl(value)
    card["training"] = {"steps": [[1, value]], "evaluations": [[0, value, value]]}
    html = page(card, None)
    assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', html)
    drawn = re.findall(r'<use [^>]*x="([-\d.]+)" y="([-\d.]+)"', html)
    assert len(drawn) > 16 and all(-1 <= float(x) <= 577 and -1 <= float(y) <= 300 for x, y in drawn)


def test_the_same_data_give_the_same_bytes(card, tmp_path):
    """In a process with another seed of hashes, and with another style in matplotlib's settings."""
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.family: serif\naxes.facecolor: red\n")
    (tmp_path / "card.json").write_text(json.dumps(card))
    code = "import json, sys; from opcd_fast.evaluation.report.page import page; "
    code += "sys.stdout.write(page(json.load(open('card.json')), 'c'))"
    settings = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, timeout=120)
    assert done.stdout.decode() == page(card, "c")


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_numbers_of_16_bits_are_called_that(card, dtype, said):
    """In the page, in the model card and under a comparison's table."""
    card["ran"]["dtype"] = dtype
    words = f"Computed in {dtype}"
    assert (words in page(card, "context")) == said and (words in readme(card)) == said
    summary = {"ran": card["ran"], "systems": {}, "baselines": {}, "differences": {}}
    assert (words in as_markdown(summary, "title")) == said


# ------------------------------------------------------------------------------------------------ a real browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium installed: apt-get install chromium")

# Added to a copy of the page, whose policy is taken out: what the browser has laid out, as JSON in the title.
MEASURE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
document.title = JSON.stringify({
  svgs: [...document.querySelectorAll('svg')].map(box), tables: [...document.querySelectorAll('table')].map(box),
  sides: [...document.querySelectorAll('.sides')].map(s => [...s.children].map(e => e.getBoundingClientRect().top)),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  outside: performance.getEntriesByType('resource').map(r => r.name),
  stroke: [...document.querySelectorAll("[id^='line-'] > path")].map(e => getComputedStyle(e).stroke),
  background: getComputedStyle(document.body).backgroundColor });
</script>"""


def browse(html, folder, *options, policy=False, to="--dump-dom"):
    """The page's elements after `html` was shown; policy: with the page's own, which forbids scripts."""
    if not policy:
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    (folder / "page.html").write_text(html)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", to, *options,
         (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=180, env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def brightness(color):
    return sum(map(int, re.findall(r"\d+", color)[:3]))


@needs_browser
def test_a_browser_shows_plots_and_tables_and_fetches_nothing(card, tmp_path):
    def measured(*options):
        dom = browse(page(card, "the context").replace("</body>", MEASURE + "</body>"), tmp_path, *options)
        return json.loads(re.search(r"<title>(\{.*?\})</title>", dom, re.DOTALL).group(1).replace("&amp;", "&"))

    wide = measured("--window-size=1100,900", "--blink-settings=preferredColorScheme=0")  # and dark
    assert len(wide["svgs"]) == 3 and len(wide["tables"]) >= 5
    for width, height in [*wide["svgs"], *wide["tables"][:4]]:
        assert width > 300 and height > 60
    assert all(len(set(tops)) == 1 for tops in wide["sides"]) and wide["sides"]  # side by side
    assert len(set(wide["stroke"])) == 3 and "none" not in wide["stroke"]
    narrow = measured("--window-size=500,900")
    assert all(len(set(tops)) == 2 for tops in narrow["sides"])  # below each other
    assert brightness(wide["background"]) < 150 < brightness(narrow["background"])
    for found in (wide, narrow):
        assert found["overflow"] <= 0 and found["outside"] == []


@needs_browser
def test_no_script_runs(card, tmp_path):
    """One in an answer, without the page's policy: escaped. One that got through: stopped by the policy."""
    dom = browse(page(card, EVIL), tmp_path)
    assert "<script" not in dom and "<img" not in dom and "<title>owned</title>" not in dom
    html = page(card, None).replace("</main>", "<script>document.title='owned'</script></main>")
    assert "<title>owned</title>" in browse(html, tmp_path), "it would run"
    assert "<title>owned</title>" not in browse(html, tmp_path, policy=True)


@needs_browser
def test_it_prints_on_two_pages(card, tmp_path):
    """With prompts and answers as long as a small run's limit allows."""
    long = {BASE: "word " * 110, SHOWN: "word " * 90, STUDENT: "word " * 100}
    card["side_by_side"] = [{"prompt": "a question of usual length?", "answers": long} for _ in range(5)]
    card["scores"] = [{**card["scores"][0], "name": name} for name in ("^Ahoy", "in capital letters")]
    card |= {"run": "runs/pirate", "base_model": "Qwen/Qwen3-1.7B"}
    to = f"--print-to-pdf={tmp_path / 'p.pdf'}"
    browse(page(card, "the context " * 400), tmp_path, "--no-pdf-header-footer", to=to)
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", (tmp_path / "p.pdf").read_bytes())
    assert len(pages) == 2


def test_an_interval_of_no_width_has_no_whisker(card):
    """A whisker is a line of its own beside the bars."""
    arms = card["scores"][0]["arms"]
    wide, narrow = arms[BASE], estimate(0.5, 0.5, 0.5)
    drawn = [score({BASE: found, SHOWN: arms[SHOWN]}).count("line2d") for found in (wide, narrow)]
    assert drawn[0] == drawn[1] + 1
