"""Proves that the report of an output folder is complete, safe against whatever the data say, and never harms a run.

    python -m pytest tests/test_report.py
"""
import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import DATA, draw_report

import eval as evaluation
import records
import report
from configuration import ModelConfig
from model import ScalarHead, Transformer

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=y> a|b `c` ```` $\\frac{1}$ ]]> & 你好 \ud800'


def stage_files(out, name, kind, metrics=None, rows=(), parents=(), written="2026-01-01T00:00:00", **facts):
    """A stage as a training script leaves it, without weights."""
    folder, log = out / name, out / "logs" / name
    for path in (folder, log):
        path.mkdir(parents=True, exist_ok=True)
    content = {"stage": kind, "finished": True, "seconds": 75.0, "seed": 7, "torch": "2.9", "written": written,
               "parents": [str(p) for p in parents], "data": ["text.jsonl"], "tokenizer": "feed", "key": "aa-bb",
               "progress": {"step": 4, "max_steps": 4, "tokens": 1000}, "metrics": metrics or {}} | facts
    for path, value in ((folder / "minillm.json", content), (log / "args.json", {"max_seq_len": 16, "epochs": 1.0}),
                        (log / "conditions.json", {"command": f"python train_{kind}.py", "conditions": {
                            "stage": kind, "data": ["text-0123"], "batch_tokens": 64, "model": {"hidden_size": 32}}}),
                        (log / "machine.json", {"cpu": "a CPU", "cores": 2}),
                        (log / "dataset_stats.json", {"train": {"samples": 9, "bytes": 300, "tokens": 100}})):
        path.write_text(json.dumps(value))
    (log / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ROWS = [{"step": 0, "val_loss": 3.0}, *({"step": i, "loss": 3 - i / 4, "grad_norm": 1.0, "tokens_per_s": 100 * i}
                                        for i in (1, 2, 3, 4)), {"step": 4, "val_loss": 2.0}]
METRICS = {"metric": "held-out bits per byte", "before": 3.25, "after": 1.125, "steps": 4}
FOUND = {"seed": 7, "compression": {"zh": 2.34, "en": 4.56},
         "samples": [{"kind": "story", "lang": "zh", "expected": "三", "answers": {"pretrain": "二", "sft": "三"},
                      "messages": [{"role": "user", "content": "几只猫？"}]}]}


@pytest.fixture
def out(tmp_path):
    """A folder with two stages, scores and findings."""
    out = tmp_path / "out"
    stage_files(out, "pretrain", "pretrain", METRICS, ROWS)
    stage_files(out, "sft", "sft", METRICS | {"metric": "held-out exact match"}, ROWS, [out / "pretrain"])
    scores = [{"weight": "sft", "group": "exact_match", "exact_match": 0.515, "standard_error": 0.021, "n": 9,
               "stop_rate": 0.987, "by_skill": {"addition": {"exact_match": 0.75, "n": 4}},
               "by_lang": {"zh": {"exact_match": 0.531}}},
              {"weight": "sft", "group": "preference", "exact_match": 0.111, "polite": 0.62, "standard_error": 0.02},
              {"weight": "sft", "group": "hellaswag", "acc_norm": 0.263, "chance": 0.25, "n": 100}]
    (out / "eval_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (out / "report.json").write_text(json.dumps(FOUND))
    return out


class Page(html.parser.HTMLParser):
    """A parsed page: its elements, its text, and tags that were not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.open += [] if tag in ("meta", "path", "use", "rect", "br") else [tag]

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += "" if self.open[-1:] == ["style"] else data


def page(out):
    """The folder's report: parsed HTML, and Markdown."""
    html_file, markdown_file = report.write(out)
    return Page(html_file.read_text(encoding="utf-8")), markdown_file.read_text(encoding="utf-8")


# -- What it says ------------------------------------------------------------------------------------------------------
def test_both_forms_hold_everything_that_was_found(out):
    parsed, text = page(out)
    for form in (parsed.text, text):
        for word in ("2 of 2", "held-out bits per byte", "3.250", "1.125", "1 min 15 s", "2 min 30 s",  # overview
                     "0.515 (0.021)", "0.987", "0.620 (0.020)", "0.531", "addition", "0.75", "hellaswag", "0.263",
                     "几只猫？", "三", "2.34", "4.56", "3.00",  # samples, compression: 300 bytes in 100 tokens
                     "python train_sft.py", "text.jsonl", "text-0123", "feed", "aa-bb", "a CPU", "--max_seq_len 16"):
            assert word in form, word
        assert "0.111" not in form, "exact match of sampled answers is another number"
        assert "reward: not run" in form and "grpo: not run" in form and "sft: not run" not in form
    assert parsed.open == [] or set(parsed.open) <= {"li", "p"}, "every element is closed"


def test_page_is_one_file_that_loads_nothing(out, monkeypatch):
    monkeypatch.setattr(report, "draw", draw_report)
    parsed, _ = page(out)
    assert "svg" in parsed.tags
    links = [value for name, value in parsed.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links and all(link.startswith("#") for link in links)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert "http-equiv" in dict(parsed.attributes) and "url(http" not in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize("gone", ["*/minillm.json", "logs/*/metrics.jsonl", "logs/*/args.json", "report.json",
                                  "logs/*/conditions.json", "logs/*/dataset_stats.json", "logs/*/machine.json",
                                  "eval_results.jsonl"])
@pytest.mark.parametrize("how", ["missing", "cut short", "of another kind"])
def test_any_part_may_be_missing_or_broken(out, gone, how):
    files = list(out.glob(gone))
    assert files
    for file in files:
        content = file.read_text()
        file.write_text({"missing": "", "cut short": content[:-len(content) // 2], "of another kind": "[1, null]"}[how])
        if how == "missing":
            file.unlink()
    parsed, _ = page(out)
    assert "Overview" in parsed.text and "pretrain" in parsed.text
    lacks = {"logs/*/metrics.jsonl": "no log below logs/sft/", "report.json": "samples, compression by language: they",
             "eval_results.jsonl": "scores: none", "*/minillm.json": "not finished: step 4"}.get(gone, "")
    if (gone, how) != ("logs/*/metrics.jsonl", "cut short"):  # the lines before are still good
        assert lacks in parsed.text


@pytest.mark.parametrize("name, content", [
    ("logs/sft/dataset_stats.json", {"train": 5}),
    ("logs/sft/dataset_stats.json", {"train": {"bytes": "x", "tokens": [], "samples": {}}}),
    ("logs/sft/conditions.json", {"conditions": 5, "command": 5}),
    ("logs/sft/conditions.json", {"conditions": {"model": 5, "data": 5, "batch_tokens": "x"}}),
    ("logs/sft/expert_load.json", {"load": 5}), ("logs/sft/expert_load.json", {"load": [5]}),
    ("logs/sft/args.json", {"max_seq_len": "x"}), ("logs/sft/reference.json", {"bands": 5}),
    ("logs/sft/metrics.jsonl", [{}]), ("report.json", {"samples": 5, "compression": 5}),
    ("report.json", {"samples": [{"messages": [5], "answers": 5}, {"messages": 5}]}),
    ("eval_results.jsonl", {"weight": "sft", "group": "exact_match", "by_skill": 5, "by_lang": 5, "apart": {"a": 5}}),
    *(("sft/minillm.json", dict.fromkeys(("args", "conditions", "data", "metrics", "parents", "progress", "runtime",
                                          "seconds", "torch", "written"), value) | {"stage": "sft", "finished": True})
      for value in (None, 5, "x", [5], {"step": [], "tokens": "x"})),
], ids=str)
def test_fields_of_another_type_are_as_good_as_missing(out, name, content):
    (out / name).write_text(json.dumps(content))
    parsed, text = page(out)
    assert "Overview" in parsed.text and "held-out bits per byte" in text and "train_pretrain.py" in text


def test_empty_folder_and_single_stage(tmp_path):
    assert "There is no stage" in page(tmp_path)[0].text
    stage_files(tmp_path, "mine", "dpo", METRICS, [{"step": 1, "loss": 0.7}], finished=False)
    (tmp_path / "mine.previous").mkdir()
    (tmp_path / "mine.previous" / "minillm.json").write_text("{}")
    parsed, _ = page(tmp_path)
    assert "0 of 1" in parsed.text and "not finished: step 1 of 4" in parsed.text and "previous" not in parsed.text


def test_nothing_in_the_data_becomes_markup(out):
    (out / "logs" / "sft" / "args.json").write_text(json.dumps({HOSTILE: HOSTILE, "max_seq_len": 16}))
    stage_files(out, "sft", HOSTILE, {"metric": HOSTILE, "before": 1, "after": HOSTILE, "stopped": HOSTILE},
                [*ROWS, {"step": 4, "verdict": f"unstable: {HOSTILE}", "alarm": HOSTILE, HOSTILE: 1}],
                [HOSTILE], torch=HOSTILE, data=[HOSTILE], key=HOSTILE)
    (out / "eval_results.jsonl").write_text(json.dumps({"weight": HOSTILE, "group": "exact_match", "exact_match": 1.0,
                                                        "by_skill": {HOSTILE: {"exact_match": 0.5}}}) + "\n")
    sample = {"kind": HOSTILE, "lang": HOSTILE, "expected": HOSTILE, "answers": {HOSTILE: HOSTILE},
              "messages": [{"role": HOSTILE, "content": HOSTILE}]}
    (out / "report.json").write_text(json.dumps({"samples": [sample], "compression": {HOSTILE: 1.0}}))
    parsed, text = page(out)
    assert not parsed.tags & {"script", "img"} and not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count(HOSTILE.replace("\ud800", "?")) > 12, "all of it is readable"
    tables = re.findall(r"(?:^\|.*\n)+", re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.M | re.S), re.M)
    assert len(tables) > 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}) == 1, "no cell splits"
    prose = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.M | re.S)
    assert not re.search(r"(?<!\\)<(script|img)", prose)


@pytest.mark.parametrize("facts, rows, said", [
    ({}, [{"step": 3, "alarm": "attention gets no gradient"}], "step 3: attention gets no gradient"),
    ({}, [{"step": 3, "sys_alarm": "memory is full"}], "step 3: memory is full"),
    ({}, [{"step": 2, "verdict": "plateau: a"}, {"step": 4, "verdict": "plateau: b"}], "plateau: b (2 such verdicts)"),
    ({}, [{"step": 5, "loss": None}], "not finite at step 5"),
    ({"metrics": {"stopped": "KL above the limit"}}, [], "stopped early: KL above the limit"),
    ({"finished": False}, [], "not finished: step 4 of 4"),
    ({"torch": "2.8"}, [], "different versions of torch: 2.8, 2.9"),
    ({"written": "2025-12-31T00:00:00"}, [], "pretrain was trained again after this stage"),
])
def test_what_must_be_known_is_a_warning(out, facts, rows, said):
    assert report.warnings_of(report.read_stages(out)) == []
    stage_files(out, "sft", "sft", facts.pop("metrics", METRICS), [*ROWS, *rows], ["pretrain"], **facts)
    found = report.warnings_of(report.read_stages(out))
    assert len(found) == 1 and said in found[0][1]


def test_scores_and_samples_of_weights_that_were_trained_again_are_a_warning(out, capsys):
    """Those of pretrain are older than its weights, those of sft, and rows without a time, are not."""
    rows = [{"weight": name, "group": group, group: 0.5, "n": 9, "time": time} for name, group, time in (
        ("pretrain", "bits_per_byte", "2025-12-31T23:59:59"), ("pretrain", "exact_match", "2026-01-01T00:00:00"),
        ("sft", "exact_match", "2026-01-01T00:00:01"), ("sft", "preference", 5), ("elsewhere", "exact_match", "2020"))]
    (out / "eval_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {"pretrain": "2025-12-31T00:00:00", "sft": "2026-01-01T00:00:00"}
    (out / "report.json").write_text(json.dumps(FOUND | {"checkpoints": made}))
    said = ("pretrain", "older than this checkpoint: its scores of bits_per_byte; measure it again, as with: python "
            "eval.py --mode score"), ("pretrain", "its samples are older than this checkpoint")
    found = report.warnings_of(report.read_stages(out), rows, FOUND | {"checkpoints": made})
    assert found[0] == said[0] and found[1][1].startswith(said[1][1]) and len(found) == 2
    parsed, text = page(out)
    assert all(words in form for _, words in said for form in (parsed.text, text)) and "2warnings" in parsed.text
    evaluation.main(evaluation.parse_args(["--mode", "summary", "--save_dir", str(out)]))
    assert "\npretrain: " + said[0][1] + "\n" in capsys.readouterr().out


def test_verdicts_that_are_fine_are_no_warning(out):
    rows = [{"step": 2, "verdict": "fine; held-out loss 1 is better than normal here"}, {"step": 4, "verdict": "fine"}]
    stage_files(out, "sft", "sft", METRICS, [*ROWS, *rows], ["pretrain"])
    stages = report.read_stages(out)
    assert report.warnings_of(stages) == [] and report.last_verdict(stages[1]) == "fine"
    assert "no alarm was raised" in page(out)[1]


def test_dropped_rows_are_a_warning(out):
    (out / "logs" / "sft" / "dataset_stats.json").write_text(json.dumps({"train": {"samples": 9, "dropped": 2}}))
    assert report.warnings_of(report.read_stages(out)) == [("sft", "train data: 2 dropped of 9 samples")]


def test_stages_come_in_the_order_of_the_story(tmp_path):
    for name, kind in (("a", "grpo"), ("b", "pretrain"), ("c", "odd"), ("d", "sft")):
        stage_files(tmp_path, name, kind)
    assert [stage["name"] for stage in report.read_stages(tmp_path)] == ["b", "d", "a", "c"]


def test_experts_are_shown_layer_by_layer(out):
    (out / "logs" / "sft" / "expert_load.json").write_text(json.dumps({"step": 4, "load": [[1.5, 0.5], [0.25, 1.75]]}))
    text = page(out)[1]
    assert "| layer 1 | 0.25 | 1.75 |" in text and "### sft, step 4" in text


# -- Arithmetic --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1},
                                    dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
                                    dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                                         n_shared_experts=1)])
def test_size_and_operations_are_those_of_the_model(change, tmp_path):
    """The model counts its own parameters; the report sees only the header of the saved file."""
    model = Transformer(ModelConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                    **{"num_key_value_heads": 2, "intermediate_size": 64, **change}))
    model.save_pretrained(tmp_path)
    shapes, config = report.read_shapes(tmp_path), records.read_fields(tmp_path / "config.json")
    assert report.parameters(shapes) == model.num_parameters()
    assert 3 * report.flops_per_token(shapes, config, 128) == model.flops_per_token(128)


def test_operations_of_a_reward_model_leave_its_embedding_out(model_folder, tmp_path):
    head = ScalarHead.from_pretrained(model_folder())
    head.config = ModelConfig.from_dict(head.config.to_dict() | {"pad_token_id": 0})
    head.save_pretrained(tmp_path)
    shapes, config = report.read_shapes(tmp_path), records.read_fields(tmp_path / "config.json")
    inside = sum(p.numel() for name, p in head.named_parameters() if p.ndim == 2 and "embed" not in name)
    attention = 4 * 2 * config["num_attention_heads"] * config["head_dim"] * 10
    assert report.flops_per_token(shapes, config, 10) == 2 * inside + attention


def test_cost_is_tokens_times_passes_times_operations(out, model_folder):
    for file in model_folder().iterdir():
        shutil.copy(file, out / "sft" / file.name)
    pretrain, sft = report.read_stages(out)
    one = Transformer.from_pretrained(model_folder()).flops_per_token(16)  # forward and backward: three passes
    found = report.cost(sft)
    assert (found["seconds"], found["tokens"], found["speed"], found["rss"]) == (75.0, 1000, 300, None)
    assert found["flop"] == pytest.approx(1000 * one)
    assert report.cost(pretrain)["flop"] is None, "without weights nobody knows"
    for kind, args, count in (("dpo", {}, 4), ("ppo", {"ppo_epochs": 2}, 17), ("grpo", {"beta": 0.0}, 4),
                              ("grpo", {"beta": 0.1, "updates_per_rollout": 2}, 9)):
        assert report.cost(sft | {"kind": kind, "args": args | {"max_seq_len": 16}})["flop"] == pytest.approx(
            1000 * one * count / 3)
    assert report.cost(sft | {"kind": "another"})["flop"] is None


@pytest.mark.parametrize("value, text", [(None, "-"), (7, "7"), (999, "999"), (1000, "1k"), (999_999, "1M"),
                                         (1_250_432, "1.25M"), (3.2e13, "32T"), (1.4e18, "1.4E"), (5e22, "5e+04E")])
def test_large_numbers_are_short(value, text):
    assert report.big(value) == text
    assert value is None or report.big(value, "B") == re.sub(r"^([\d.e+]+)", r"\1 ", text) + "B"


@pytest.mark.parametrize("seconds, text", [(None, "-"), (0.4, "0 s"), (59.6, "1 min 0 s"), (229.3, "3 min 49 s"),
                                           (7500, "2 h 5 min")])
def test_times_are_short(seconds, text):
    assert report.duration(seconds) == text


def test_long_curves_are_means_of_neighbours():
    points = [(step, 2.0 * step) for step in range(1000)]
    few = report.thin(points)
    assert len(few) <= report.POINTS and few[0] == (1.5, 3.0) and few[-1] == (997.5, 1995.0)
    assert report.thin(points[:300]) == points[:300]


# -- Pictures ----------------------------------------------------------------------------------------------------------
def test_picture_takes_the_colours_of_the_page():
    rows = [{"step": i, "loss": 8 / i, "val_loss": 8.5 / i} for i in range(1, 50)]
    svg = draw_report("loss", ("loss", "val_loss", "absent"), rows, True)
    assert svg.startswith("<svg ") and svg.endswith("</svg>\n") and "currentColor" in svg
    assert report.INK not in svg and "DejaVu" not in svg and "http:" not in re.sub(r'xmlns[:\w]*="[^"]*"', "", svg)
    assert svg.count(">loss<") == 2 and ">val_loss<" in svg and "absent" not in svg, "title and legend"
    banded = draw_report("loss", ("loss",), rows, True, {"loss": [[1, 7, 9], [40, 0.1, 0.3]]})
    assert "FillBetween" in banded or banded.count("<path") > draw_report("loss", ("loss",), rows, True).count("<path")


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"step": 1, "loss": None}], [{"step": 1, "loss": "x"}],
                                  [{"step": 1, "loss": True}]])
def test_picture_without_data_is_left_out(rows):
    assert draw_report("loss", ("loss",), rows) == ""


def test_curves_of_zero_and_below_have_a_plain_axis():
    assert draw_report("kl", ("kl",), [{"step": 1, "kl": 0.0}, {"step": 2, "kl": -1.0}], True).startswith("<svg")


def test_every_picture_has_a_key_that_the_scripts_log():
    code = "".join(path.read_text(encoding="utf-8") for path in Path(report.__file__).parent.glob("*.py")
                   if path.name not in ("report.py", "logs.py"))
    words = set(re.findall(r"\w+", code))
    for title, keys, _ in report.PANELS:
        stems = {key if key in words else key.split("_")[0] for key in keys}
        assert stems <= words, title


# -- In a run ----------------------------------------------------------------------------------------------------------
def test_failure_costs_a_line_and_never_the_run(out, monkeypatch, capsys):
    report.refresh(out, is_main=False)
    assert not (out / "report.html").exists() and capsys.readouterr().out == ""
    report.refresh(out)
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    before = (out / "report.html").read_bytes()

    def full(*names):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    report.refresh(out)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no space left" in said and "python eval.py --report" in said
    assert (out / "report.html").read_bytes() == before, "the old page is whole"


@pytest.mark.parametrize("name", sorted(DATA))
def test_every_stage_leaves_a_report(name, stage, tmp_path, capsys):
    module, argv = stage(name, "--max_steps", "2")
    module.main(module.parse_args(argv))
    assert f"report: {tmp_path / 'out' / 'report.html'}\n" in capsys.readouterr().out
    parsed = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "1 of 1" in parsed.text and re.search(r"\| run \| [\w (),@-]+ \| [-\d.]+ \| [-\d.]+ \| 2 \| ", text)
    cost = report.cost(report.read_stages(tmp_path / "out")[0])
    assert cost["tokens"] > 10 and cost["flop"] > 0 and cost["speed"] > 0


def test_eval_rebuilds_it_with_answers_of_all_checkpoints(out, model_folder, tokenizer, capsys):
    for name in ("pretrain", "sft"):
        for file in model_folder().iterdir():
            shutil.copy(file, out / name / file.name)
    (out / "data").mkdir()
    rows = [{"conversations": [{"role": "user", "content": f"2 + {i}?"}, {"role": "assistant", "content": "x"}],
             "answer": str(2 + i), "check": "number", "lang": "en", "skill": "add"} for i in range(3)]
    texts = [{"text": "小猫是棕色的。", "lang": "zh"}, {"text": "The answer is 5.", "lang": "en"}]
    for name, lines in (("sft", rows), ("pretrain", texts)):
        (out / "data" / f"{name}.heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    before = (out / "report.json").read_text()
    argv = ["--report", str(out), "--device", "cpu", "--dtype", "float32", "--threads", "1", "--seed", "3"]
    result = evaluation.main(evaluation.parse_args(argv))
    assert result == {"report": str(out / "report.html")} and "2 + " not in capsys.readouterr().out
    found = json.loads((out / "report.json").read_text())
    sample, = found["samples"]
    assert list(sample["answers"]) == ["pretrain", "sft"] == list(found["checkpoints"]) and found["seed"] == 3
    assert found["checkpoints"]["sft"] == records.read_fields(out / "sft" / "minillm.json")["written"]
    assert sample["expected"] == str(2 + int(re.search(r"2 \+ (\d)", sample["messages"][0]["content"])[1]))
    for row in texts:
        size = len(row["text"].encode()) / len(tokenizer.encode(row["text"]))
        assert found["compression"][row["lang"]] == pytest.approx(size)
    assert before != (out / "report.json").read_text()
    evaluation.main(evaluation.parse_args(argv))
    assert json.loads((out / "report.json").read_text()) == found, "the same seed, the same samples"
    (out / "data" / "sft.heldout.jsonl").unlink()
    evaluation.main(evaluation.parse_args([*argv, "--data_dir", str(out / "gone")]))
    assert json.loads((out / "report.json").read_text()) == found, "without questions the old answers stay"
    with pytest.raises(FileNotFoundError, match="is no folder"):
        evaluation.main(evaluation.parse_args(["--report", str(out / "gone"), "--device", "cpu"]))
