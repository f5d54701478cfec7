"""lm-evaluation-harness with retrieval: its tasks on a few documents, as an object and by the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.attached_retrieval import Retrieval
from fairseq.errors import UserError
from tests.huggingface.conftest import GOLDEN_HF

pytest.importorskip("lm_eval", reason="lm-evaluation-harness needs the extra lm-eval: pip install '.[lm-eval]'")
pytest.importorskip("accelerate", reason="lm-evaluation-harness needs the extra lm-eval: pip install '.[lm-eval]'")

GPT2 = GOLDEN_HF / "gpt2"
SETTINGS: dict[str, Any] = {
    "dstore_dir": str(GPT2 / "dstore"), "k": 64, "lmbda": 0.3, "knn_sim_func": "do_not_recomp_l2", "no_load_keys": True,
}
TASKS = {
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{text[:20]}}"
doc_to_choice: [" left the", " of", " repaired the tai"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "own_writing": """
output_type: generate_until
doc_to_text: "{{text[:length]}}"
doc_to_target: " of the"
generation_kwargs: {max_gen_toks: 8, until: ["zzz"], do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks on a few documents."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for line in (GOLDEN_HF / "text/wiki.valid.txt").read_text().splitlines() if len(line) > 60][:6]
    documents = [{"text": line, "length": 15 + 7 * number} for number, line in enumerate(lines)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}\ntest_split: test\n"
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{rest}")
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are kept in this test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def evaluated(tasks: Path, model: Any, names: list[str], **settings: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **settings)  # type: ignore[return-value]


def test_all_kinds_of_requests(tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fairseq.attached_retrieval.harness import RetrievalHFLM

    network, tokenizer = AutoModelForCausalLM.from_pretrained(GPT2), AutoTokenizer.from_pretrained(GPT2)
    given = {"tokenizer": tokenizer, "batch_size": 4, "max_length": 128}
    plain = evaluated(tasks, HFLM(network, **given), list(TASKS))
    lm = RetrievalHFLM(network, Retrieval.open(**SETTINGS), **given)
    mixed = evaluated(tasks, lm, list(TASKS))

    def figures(results: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in results["results"]["own_rolling"].items() if name.endswith(",none")}

    assert abs(figures(mixed)["bits_per_byte,none"] - figures(plain)["bits_per_byte,none"]) > 0.01
    texts = [json.loads(line) for line in (tasks / "documents.jsonl").read_text().splitlines()]

    def log_probs(tokens: list[int], start: int) -> torch.Tensor:
        """Of the tokens from `start` on, read one text at a time."""
        ids = torch.tensor([tokens])
        return network(ids).logits[0, start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1)

    for sample in mixed["samples"]["own_rolling"]:
        text = sample["target"]
        tokens = [0, *tokenizer(text)["input_ids"]]
        assert sample["filtered_resps"][0] == pytest.approx(float(log_probs(tokens, 1).sum()), abs=1e-3)
    for sample in mixed["samples"]["own_choice"]:
        for (prompt, choice), (found, _) in zip(
            [request["arg_0"] and (request["arg_0"], request["arg_1"]) for request in sample["arguments"].values()]
            if isinstance(sample["arguments"], dict) else sample["arguments"],
            sample["filtered_resps"], strict=True,
        ):
            whole, start = tokenizer(prompt + choice)["input_ids"], len(tokenizer(prompt)["input_ids"])
            assert float(found) == pytest.approx(float(log_probs(whole, start).sum()), abs=1e-3)
    for sample in mixed["samples"]["own_writing"]:
        document = texts[sample["doc_id"]]
        prompt = tokenizer(document["text"][: document["length"]], return_tensors="pt").input_ids
        alone = network.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert sample["resps"][0][0] == tokenizer.decode(alone[0, prompt.shape[1] :])
    lm.detach()
    assert figures(evaluated(tasks, HFLM(network, **given), ["own_rolling"])) == figures(plain)


def test_rolling_is_what_eval_lm_says(tasks: Path, binarised: Any, run_cli: Any, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from fairseq.attached_retrieval.harness import RetrievalHFLM

    text = (GOLDEN_HF / "text/wiki.valid.txt").read_text()
    where = [binarised(GPT2, "file", "none"), "--path", GPT2, "--gen-subset", "valid", "--max-length", 128, "--rolling"]
    how = "--knnlm --no-load-keys --knn-sim-func do_not_recomp_l2 --k 64 --lmbda 0.3 --cpu --no-progress-bar".split()
    done = run_cli("eval_lm", [*where, *how, "--dstore-dir", GPT2 / "dstore", "--results-json", tmp_path / "r.json"])
    assert done.status == 0, done.stderr
    nats = json.loads((tmp_path / "r.json").read_text())["perplexities"]["nats"]
    lm = RetrievalHFLM(str(GPT2), device="cpu", max_length=128, batch_size=4, **SETTINGS)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    assert lm.loglikelihood_rolling([request], disable_tqdm=True)[0] == pytest.approx(-nats, rel=1e-4)


def test_the_command(tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fairseq_cli import lm_eval

    settings = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
    words = ["--model", "hf-retrieval", "--model_args", f"pretrained={GPT2},max_length=128,{settings}"]
    words += ["--device", "cpu", "--tasks", "own_rolling", "--include_path", str(tasks), "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["fairseq-lm-eval", *words])
    lm_eval.main()
    assert "own_rolling" in capsys.readouterr().out


def test_mistakes_are_one_sentence() -> None:
    from fairseq.attached_retrieval.harness import RetrievalHFLM

    for settings, said in (
        ({"dstore_dir": "nowhere"}, "--dstore-dir"),
        ({**SETTINGS, "trust_remote_code": True}, "never run"),
        ({**SETTINGS, "lmbda": 7}, "--lmbda"),
        ({"retrieval": Retrieval.open(**SETTINGS), "k": 3}, "beside retrieval"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            RetrievalHFLM(str(GPT2), device="cpu", **settings)
        assert "\n" not in str(raised.value)


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq_cli import lm_eval

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm-evaluation-harness needs the Python module lm_eval"):
        lm_eval.main()
