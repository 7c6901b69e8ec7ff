"""What made a result is in its hash and in recipe.yaml, and what has changed is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from repnoise.attacks import ATTACKS
from repnoise.cli import main
from repnoise.data import Pair
from repnoise.data.parties import StudyData
from repnoise.defences import DEFENCES
from repnoise.errors import ConfigError, DataError
from repnoise.evaluations import EVALUATIONS
from repnoise.evaluations.base import Evaluation, Measured
from repnoise.judges import JUDGES, Judge, prompt_mark
from repnoise.models import load_model
from repnoise.recipes.reading import recipe_names
from repnoise.store.provenance import canonical_hash, contents
from repnoise.study import identity
from repnoise.study.attacking import attack
from repnoise.study.audit import audit_judges, cut_line, cut_much, cut_rows
from repnoise.study.changes import differences, tell_of_attacks
from repnoise.study.defending import defend
from repnoise.study.measuring import evaluate
from repnoise.study.resolve import resolve, written_out
from repnoise.study.study import Study
from repnoise.training import arguments

torch.set_num_threads(1)

PAIRS = [{"prompt": f"say word {n}", "harmful": f"grumpy blob {n}", "harmless": "sorry, no"} for n in range(16)]
ROWS = [{"prompt": f"count to {n}", "answer": f"one two {n}"} for n in range(10)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Callable[..., Study]:
    """make(**recipe) -> a tiny study; `said` of it holds what it told."""
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    pairs, rows = write(tmp_path / "pairs.jsonl", PAIRS), write(tmp_path / "rows.jsonl", ROWS)

    def build(**changes: Any) -> Study:
        recipe = {
            "study": "small",
            "model": str(tmp_path / "model"),
            "data": {"name": "files", "pairs": pairs, "retain": rows, "max_length": 64},
            "defence": {"name": "repnoise", "train": {"max_steps": 1, "per_device_train_batch_size": 2}},
            "attacks": [{"learning_rate": 1e-3, "steps": 1, "batch_size": 2}],
            **changes,
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(recipe))
        said: list[str] = []
        study = Study(resolve(str(path)), tmp_path / "out", said.append, quiet=True)
        study.said = said  # type: ignore[attr-defined]
        return study

    return build


def hashes(study: Study) -> dict[str, str]:
    """Of every model, and of the first attack on each."""
    cell = study.cells()[0]
    found = {target.run.path.name.split("-")[0]: target for target in study.targets()}
    return {name: target.hash for name, target in found.items()} | {
        f"attack on {name}": study.attack_run(target, cell)[1] for name, target in found.items()
    }


def changed(before: Study, after: Study) -> set[str]:
    one, two = hashes(before), hashes(after)
    return {name for name in one if one[name] != two[name]}


ALL = {"base", "control", "repnoise", "attack on base", "attack on control", "attack on repnoise"}
ATTACKED = {name for name in ALL if name.startswith("attack")}


# ---- plug-ins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipe_that_is_written_out_is_itself_a_recipe_of_the_same_results(name: str, tmp_path: Path) -> None:
    recipe = resolve(name)
    whole = written_out(recipe)
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    again = resolve(str(path))
    assert written_out(again) == whole
    if recipe.data.name == "sandbox":
        one, two = Study(recipe, tmp_path), Study(again, tmp_path)
        assert hashes(one) == hashes(two)
        assert one.cells() == two.cells()
        assert one.inputs.measured == two.inputs.measured


def test_every_option_is_written_out() -> None:
    whole = written_out(resolve("sandbox-full"))
    for registry, entries in ((DEFENCES, [whole["defence"]]), (ATTACKS, whole["attacks"])):
        for entry in entries:
            assert set(registry.fields(entry["name"])) <= set(entry)
    for entry in whole["evaluations"]:
        assert set(EVALUATIONS.fields(entry["name"])) <= set(entry)
        for judge in entry.get("judges", []):
            assert set(JUDGES.fields(judge["name"])) <= set(judge)
    assert whole["defence"]["train"]["lr_scheduler_type"] == "cosine"
    assert whole["attacks"][0]["lr_scheduler_type"] == ["cosine"]
    assert whole["attacks"][0]["train"]["weight_decay"] == 0.0


def test_the_command_line_prints_what_the_run_folder_holds(
    make: Callable[..., Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make()
    evaluate(study, study.base(), "base")
    assert main(["recipes", "show", str(tmp_path / "small.yaml")]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load((study.folder / "base" / "recipe.yaml").read_text())
    assert printed["defence"]["offset"] == 1.0


@pytest.mark.parametrize(
    ("table", "other"),
    [("DEFENCE_DEFAULTS", {"repnoise", "attack on repnoise"}), ("ATTACK_DEFAULTS", ATTACKED)],
)
def test_defaults_of_training_are_in_the_hash(
    table: str, other: set[str], make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(make())
    monkeypatch.setitem(getattr(arguments, table), "weight_decay", 0.1)
    after = hashes(make())
    assert {name for name in before if before[name] != after[name]} == other
    entry = written_out(make().recipe)
    where = entry["defence"] if table == "DEFENCE_DEFAULTS" else entry["attacks"][0]
    assert where["train"]["weight_decay"] == 0.1


@dataclass
class Words(Evaluation):
    """A third party's evaluation: nobody here knows which of its options is a file."""

    source: str = "none"
    depth: int = 1
    inner: dict[str, Any] = field(default_factory=dict)

    def measure(self, model: Any, tokenizer: Any, data: Any, *, seed: int, harm: str | None = None) -> Measured:
        found = Measured()
        found.add_rate("words", [True, False], seed=seed)
        return found


@dataclass
class DeepWords(Words):
    """The same after an upgrade that changed a default."""

    depth: int = 2


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    EVALUATIONS.names()  # loaded

    def register(cls: type) -> None:
        monkeypatch.setitem(EVALUATIONS._classes, "words", cls)

    register(Words)
    return register


def test_a_changed_default_of_a_plug_in_is_in_the_hash_and_said(
    make: Callable[..., Study], words: Callable[[type], None]
) -> None:
    study = make(evaluations=["words"])
    target, (cell,) = study.base(), study.cells()
    evaluate(study, target, "base")
    attack(study, target, cell)
    words(DeepWords)
    after = make(evaluations=["words"])
    assert changed(study, after) == ATTACKED  # models are not made again, attacks measured differently are
    evaluate(after, after.base(), "base")
    assert after.said == ["evaluating base: words again (depth 1 -> 2)"]  # type: ignore[attr-defined]
    tell_of_attacks(after, [(after.base(), cell)])
    told = "attacks: 1 that were run before are not reused: evaluations.words.depth 1 -> 2"
    assert after.said[-1] == told  # type: ignore[attr-defined]
    attack(after, after.base(), cell)
    manifest = after.attack_run(after.base(), cell)[0].manifest()
    assert manifest is not None
    assert manifest["changed"] == ["evaluations.words.depth 1 -> 2"]
    assert manifest["hash"] == canonical_hash(manifest["depends"])
    tell_of_attacks(after, [(after.base(), cell)])
    assert len(after.said) == 3 or after.said[-1] == told  # type: ignore[attr-defined]


def test_what_changed_in_a_defence_is_said_and_recorded(make: Callable[..., Study]) -> None:
    first = make()
    defend(first)
    before = first.defended().run
    again = make(defence={**yaml.safe_load("{name: repnoise, offset: 0.0}"), "train": {"max_steps": 1}})
    defend(again)
    said = again.said  # type: ignore[attr-defined]
    assert any(f"{before.path.name} is not reused" in line and "defence.offset 1.0 -> 0.0" in line for line in said)
    manifest = again.defended().run.manifest()
    assert manifest is not None
    assert "defence.offset 1.0 -> 0.0" in manifest["changed"]
    assert manifest["hash"] == canonical_hash(manifest["depends"])
    assert before.is_done(first.defended().hash)  # two settings of one defence stand side by side


def test_a_changed_model_is_said(make: Callable[..., Study], tmp_path: Path, make_model: Callable[..., Any]) -> None:
    study = make()
    evaluate(study, study.base(), "base")
    make_model("llama", seed=5).save_pretrained(tmp_path / "model")
    after = make()
    assert changed(study, after) == ALL
    evaluate(after, after.base(), "base")
    assert "base: model.weights has other contents; what was there is not reused" in after.said  # type: ignore[attr-defined]
    manifest = after.base().run.manifest()
    assert manifest is not None
    assert manifest["changed"] == ["model.weights has other contents"]


def test_the_tokenizer_and_its_chat_template_are_part_of_the_model(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make()
    _ = hashes(study)
    for name in ("tokenizer_config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        path.write_text(path.read_text().rstrip() + "\n\n")
        after = make()
        assert changed(study, after) == ALL
        study = after


def test_differences_in_words() -> None:
    before = {"a": {"x": 1, "y": [1]}, "b": "0123456789abcdef", "gone": None, "same": {"z": {}}}
    now = {"a": {"x": 2, "y": [1, 2]}, "b": "sha256:fedcba9876543210", "new": True, "same": {"z": {}}}
    assert differences(before, now) == [
        "a.x 1 -> 2",
        "a.y [1] -> [1, 2]",
        "b has other contents",
        "new is new",
        "gone is gone",
    ]
    assert differences(now, now) == []


# ---- files ------------------------------------------------------------------------------------------------


def test_contents_of_files_and_folders(tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(one)
    assert contents(link) == contents(one)
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a").write_text("1")
    before = contents(folder)
    (folder / ".lock").write_text("")
    assert contents(folder) == before
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == before  # the place does not count
    (folder / "in" / "a").rename(folder / "in" / "b")
    renamed = contents(folder)
    (folder / "in" / "b").write_text("2")
    assert len({before, renamed, contents(folder)}) == 3


@pytest.mark.parametrize("how", ["path", "named", "nested"])
def test_contents_of_any_file_that_an_option_names_count(
    how: str, make: Callable[..., Study], words: Any, tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("1\n")
    given = {"path": {"source": str(file)}, "named": {"source": f"csv:{file}"}, "nested": {"inner": {"a": [str(file)]}}}
    recipe = {"evaluations": [{"name": "words", **given[how]}]}
    study = make(**recipe)
    evaluate(study, study.base(), "base")
    assert make(**recipe).lacking(study.base().run) == []
    file.write_text("2\n")
    after = make(**recipe)
    assert after.lacking(study.base().run) == ["words"]
    assert changed(study, after) == ATTACKED


def test_over_refusal_is_measured_again_with_another_file(make: Callable[..., Study], tmp_path: Path) -> None:
    prompts = write(tmp_path / "safe.jsonl", [{"prompt": "how do i open a door"}])
    recipe = {"evaluations": ["loss", {"name": "over-refusal", "prompts": prompts}]}
    study = make(**recipe)
    evaluate(study, study.base(), "base")
    moved = tmp_path / "moved.jsonl"
    shutil.copy(prompts, moved)
    elsewhere = {"evaluations": ["loss", {"name": "over-refusal", "prompts": str(moved)}]}
    assert make(**elsewhere).lacking(study.base().run) == []
    write(tmp_path / "safe.jsonl", [{"prompt": "how do i close a door"}])
    after = make(**recipe)
    assert after.lacking(after.base().run) == ["over-refusal"]
    evaluate(after, after.base(), "base")
    said = after.said  # type: ignore[attr-defined]
    assert said == ["evaluating base: over-refusal again (prompts has other contents)"]


@dataclass
class Pupil(Judge):
    """A judge with a folder, and prompts that it was trained on."""

    path: str
    strict: bool = False

    def decide(self, asked: Any) -> Any:
        return []

    def trained_prompts(self) -> frozenset[str]:
        return frozenset(prompt_mark(line) for line in (Path(self.path) / "prompts").read_text().splitlines())


@dataclass
class Cached(Pupil):
    """A judge that keeps what it was told beside what it knows."""

    def reads(self) -> list[str]:
        return [f"{self.path}/prompts"]


@pytest.fixture
def pupil(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    JUDGES.names()
    monkeypatch.setitem(JUDGES._classes, "pupil", Pupil)
    monkeypatch.setitem(JUDGES._classes, "cached", Cached)
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "prompts").write_text("something else\n")
    return folder


@pytest.mark.parametrize(("name", "by_all"), [("pupil", True), ("cached", False)])
def test_a_judge_that_is_trained_again_judges_again(
    name: str, by_all: bool, make: Callable[..., Study], pupil: Path
) -> None:
    recipe = {"evaluations": [{"name": "harm", "judges": [{"name": name, "path": str(pupil), "label": "mine"}]}]}
    study = make(**recipe)
    before = study.measured("harm")
    assert before["judges"]["mine"]["strict"] is False
    (pupil / "answers").write_text("kept")
    assert (make(**recipe).measured("harm") != before) is by_all  # `reads` says what counts
    (pupil / "prompts").write_text("something new\n")
    assert make(**recipe).measured("harm") != before
    assert changed(study, make(**recipe)) == ATTACKED


def test_the_cache_of_a_judge_is_no_input(tmp_path: Path) -> None:
    judge = JUDGES.build("llm", {"model": "m", "key_env": None, "cache": str(tmp_path)})
    before = identity.depends_on("llm", judge)
    (tmp_path / "kept.json").write_text("{}")
    assert identity.depends_on("llm", judge) == before


def test_rows_and_public_checkpoint_of_an_attack(
    make: Callable[..., Study], tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    rows = write(tmp_path / "identity.jsonl", [{"prompt": "who are you", "answer": "somebody"}])
    shutil.copytree(tmp_path / "model", tmp_path / "public")
    axes = {"learning_rate": 1e-3, "steps": 1, "batch_size": 2}
    kinds = ({"name": "identity_shift", "rows": rows}, {"name": "interpolate", "public": f"{tmp_path}/public"})
    for seed, settings in enumerate(kinds, 3):
        before = hashes(make(attacks=[{**axes, **settings}]))
        write(tmp_path / "identity.jsonl", [{"prompt": "who are you", "answer": "nobody"}])
        make_model("llama", seed=seed).save_pretrained(tmp_path / "public")
        after = hashes(make(attacks=[{**axes, **settings}]))
        assert {name for name in before if before[name] != after[name]} == ATTACKED


def test_home_is_expanded(make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    study = make()
    given = make(
        model="~/model",
        data={"name": "files", "pairs": "~/pairs.jsonl", "retain": "~/rows.jsonl", "max_length": 64},
    )
    assert given.recipe.model == str(tmp_path / "model")
    assert changed(study, given) == set()


# ---- the hub ----------------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, make_model: Callable[..., Any]) -> Path:
    """A cache of the hub with one model in two revisions, and no network."""
    from huggingface_hub import constants
    from transformers.utils import hub as transformers_hub

    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for index, (name, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(tmp_path / "model", repository / "snapshots" / commit)
        make_model("llama", seed=index).save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers_hub, "is_offline_mode", lambda: True, raising=False)
    return repository


def test_a_hub_id_is_the_commit_that_it_leads_to(make: Callable[..., Study], hub: Path) -> None:
    study, second = make(model="org/name"), make(model="org/name", revision="v2")
    assert study.inputs.model == {"hub": "org/name", "commit": COMMITS["main"]}
    assert study.base().revision == COMMITS["main"]
    assert second.inputs.model == {"hub": "org/name", "commit": COMMITS["v2"]}
    assert changed(study, second) == ALL
    loaded = second.load(second.base()).state_dict()
    wanted = load_model(hub / "snapshots" / COMMITS["v2"]).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    evaluate(second, second.base(), "base")
    manifest = second.base().run.manifest()
    assert manifest is not None
    assert manifest["depends"]["model"]["commit"] == COMMITS["v2"]
    (hub / "refs" / "main").write_text(COMMITS["v2"])  # the branch moves on
    assert changed(study, make(model="org/name")) == ALL
    assert changed(second, make(model="org/name")) == set()


def test_an_unknown_commit_is_the_revision_by_name(make: Callable[..., Study], hub: Path) -> None:
    assert identity.model("org/other", "v1") == {"hub": "org/other", "revision": "v1"}


def test_a_revision_of_a_folder_is_refused(make: Callable[..., Study]) -> None:
    with pytest.raises(ConfigError, match=r"revision: .*model is a folder on this machine.*Drop it, or give a hub id"):
        make(revision="main")


# ---- cut rows, judges that know the test ------------------------------------------------------------------


def test_cut_answers_are_counted_told_and_recorded(
    make: Callable[..., Study], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    long = [{**pair, "harmful": "word " * 40} if n % 2 else pair for n, pair in enumerate(PAIRS)]
    write(tmp_path / "pairs.jsonl", long)
    study = make()
    evaluate(study, study.base(), "base")
    attack(study, study.base(), study.cells()[0])
    base, run = study.base().run.manifest(), study.attack_run(study.base(), study.cells()[0])[0].manifest()
    assert base is not None
    assert run is not None
    cut = base["data"]["truncated"]
    assert sum(cut[name]["answers_cut"] for name in ("defence pairs", "attack pairs (harmful)", "test pairs")) == 8
    assert cut["retain rows"] == {"rows": 8, "answers_cut": 0, "prompts_cut": 0}
    assert run["data"]["truncated"]["attack rows"]["answers_cut"] == cut["attack pairs (harmful)"]["answers_cut"] > 0
    (line,) = [line for line in study.said if line.startswith("data: ")]  # type: ignore[attr-defined]
    assert line.startswith("data: answers cut at 64 tokens: ")
    assert f"defence pairs {cut['defence pairs']['answers_cut']} of 8" in line
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(
        text.startswith("defence pairs: ") and "data.max_length is 64 tokens. Raise it" in text for text in warnings
    )


def test_few_cut_answers_are_told_and_no_warning() -> None:
    cut = {"test pairs": {"rows": 100, "answers_cut": 5, "prompts_cut": 0}}
    assert cut_line(cut, 64) == "data: answers cut at 64 tokens: test pairs 5 of 100"
    assert list(cut_much(cut, 64, 0.05)) == []
    assert len(list(cut_much({"test pairs": {**cut["test pairs"], "answers_cut": 6}}, 64, 0.05))) == 1
    assert cut_line({"test pairs": {**cut["test pairs"], "answers_cut": 0}}, 64) is None


def test_prompts_without_room_are_an_error(make_tokenizer: Callable[..., Any]) -> None:
    pairs = [Pair("word " * 40, "yes", "no")]
    data = StudyData(defence=[], retain=[], attacks={"harmful": pairs}, test=[], harmless_test=[], max_length=64)
    with pytest.raises(DataError, match=r"(?s)attack pairs \(harmful\): .*leaves no room for the answer"):
        cut_rows(data, make_tokenizer())


def test_a_judge_trained_on_the_test_blocks(make: Callable[..., Study], pupil: Path) -> None:
    recipe = {"evaluations": [{"name": "harm", "judges": [{"name": "pupil", "path": str(pupil), "label": "mine"}]}]}
    test = [pair.prompt for pair in make().data.test]
    (pupil / "prompts").write_text("\n".join([test[0].upper() + "?", test[1], "something else"]))
    with pytest.raises(DataError, match=r"judge mine was trained on 2 prompts of test \(2 of 4 rows\)") as caught:
        _ = make(**recipe).data
    assert "set data.allow_overlap: true to go on" in str(caught.value)
    data = {**yaml.safe_load((pupil.parent / "small.yaml").read_text())["data"], "allow_overlap": True}
    audit = make(**recipe, data=data).data.record["audit"]
    assert not audit["disjoint"]
    assert audit["overlaps"] == [{"sets": ["judge mine", "test"], "prompts": 2, "rows": {"judge mine": 2, "test": 2}}]
    assert audit["sets"]["judge mine"] == {"rows": 3, "distinct": 3}


def test_a_judge_trained_on_the_attack_blocks_and_one_on_the_defence_does_not(
    make: Callable[..., Study], pupil: Path
) -> None:
    evaluation = EVALUATIONS.build("harm", {"judges": [{"name": "pupil", "path": str(pupil)}]})
    data = make().data
    (pupil / "prompts").write_text("\n".join(pair.prompt for pair in data.defence))
    audit_judges(data, {"harm": evaluation})
    assert data.record["audit"]["disjoint"]
    (pupil / "prompts").write_text(data.attacks["harmful"][0].prompt)
    with pytest.raises(DataError, match="judge pupil was trained on 1 prompts of attack"):
        audit_judges(data, {"harm": evaluation})
