"""The recipe: what is refused, how it is said, and that nothing but a UserError ever comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from finetune import recipe, yamlfile
from finetune.errors import Problem, UserError
from finetune.recipe import Recipe, changed, fingerprint, load, load_resolved, resolved_yaml, settings

ROOT = Path(__file__).parent.parent
CONTRACT = """\
base: mistralai/Mistral-7B-v0.1      # Hub id, folder, or `pocket` (bundled, offline)
revision: null
quantization: nf4                    # nf4 | int8 | none
lora: {rank: 16, alpha: 16, dropout: 0.0, targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj], layers: all}
data:
  train: examples
  held_out: auto
  max_tokens: 2048
  parts: bold
  intended: null
  replay: null
formats:
  train: [chatml, alpaca, vicuna-v1.1, user-assistant-plain, md-bold-role]
  held_out: [zephyr, guanaco, mistral-v1, openchat-3.5, xml-tags]
  draw: each_epoch
  sampled: 0.0
optimizer: {name: adamw, learning_rate: 1.0e-7, betas: [0.9, 0.999], eps: 1.0e-8, schedule: constant, warmup_steps: 0, weight_decay: 0.0, max_grad_norm: 1.0}
regularise: {stochastic_depth: 0.0, goldfish: null, self_replay: 0.0}
epochs: 600
batch_size: 1
shuffle: each_epoch
watch:
  every: auto
  budget: 0.05
  prompts: []
  stop_at: overfit
  keep: {max_gib: 10}
machine: {micro_batch: auto, activation_checkpointing: auto, prefix_gib: 20}
seed: 0
report_to: []
hub: {repo: null, private: true}
"""  # noqa: E501  # as it stands in the contract
SHORT = "base: pocket\ndata:\n  train: examples\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a dataset in it, and the shortest valid recipe as x.yaml."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "own.jsonl").touch()
    (tmp_path / "x.yaml").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(text: str | bytes, *sets: str) -> list[str]:
    """The lines a user sees for a recipe of this text; empty where it is valid."""
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        load("x.yaml", sets)
    except UserError as error:
        return [str(problem) for problem in error.problems]
    return []


def only(text: str | bytes, *sets: str) -> str:
    lines = told(text, *sets)
    assert len(lines) == 1, lines
    return lines[0]


# --- what is valid


def test_every_recipe_on_disk_validates() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) >= 6
    for path in recipes:
        load(path)


def test_the_contract_shows_the_defaults(folder: Path) -> None:
    (folder / "whole.yaml").write_text(CONTRACT)
    assert load("whole.yaml") == load("x.yaml", ["base=mistralai/Mistral-7B-v0.1"])


def test_every_key_of_the_contract_is_a_setting_and_no_other(folder: Path) -> None:
    def keys(data: object, prefix: str = "") -> set[str]:
        if not isinstance(data, dict):
            return {prefix}
        return {key for name, inner in data.items() for key in keys(inner, f"{prefix}.{name}".lstrip("."))}

    known = {one.key for one in settings() if not one.key.startswith("data.replay.")}
    assert known == keys(yamlfile.parse(CONTRACT, "contract").data)


def test_1e_minus_7_is_a_number(folder: Path) -> None:
    for text in ("1e-7", "1.0e-7", "0.0000001", "1E-7", "+1e-7", ".1e-6"):
        loaded = load("x.yaml", [f"optimizer.learning_rate={text}"])
        assert loaded.optimizer.learning_rate == 1e-7


def test_no_is_not_false(folder: Path) -> None:
    for word in ("no", "off", "on", "yes", "n", "y"):
        assert only(f"{SHORT}hub: {{private: {word}}}\n").startswith(f"x.yaml:4  hub.private is {word}.")
        assert load_text(f"{SHORT}revision: {word}\n").revision == word
    assert load_text(f"{SHORT}hub: {{private: false}}\n").hub.private is False


def load_text(text: str) -> Recipe:
    Path("x.yaml").write_text(text)
    return load("x.yaml")


def test_quoted_numbers_and_dates_stay_text(folder: Path) -> None:
    assert load_text(SHORT + "revision: '1e-7'\n").revision == "1e-7"
    assert load_text(SHORT + "revision: 2024-01-01\n").revision == "2024-01-01"
    assert "In quotes, if text is meant." in only(SHORT + "revision: 7231864\n")
    assert "lora.rank is 8." in only(SHORT + "lora: {rank: '8'}\n")


# --- what is refused, and how


def test_typo_in_recipe_names_line_and_neighbour(folder: Path) -> None:
    assert only(SHORT + "lora:\n  alpha: 8\n  rnak: 8\n") == (
        "x.yaml:6  lora.rnak is not a setting.  Did you mean lora.rank?"
    )


def test_setting_in_the_wrong_section_is_shown_its_place(folder: Path) -> None:
    assert only(SHORT + "rank: 8\n") == "x.yaml:4  rank is not a setting.  Did you mean lora.rank?"
    assert only(SHORT + "lora.rank: 8\n") == "x.yaml:4  lora.rank is not a setting.  Write rank indented below `lora:`."
    assert "Did you mean epochs?" in only(SHORT + "num_epochs: 8\n")
    assert "sft explain" in only(SHORT + "zzz: 8\n")


def test_all_problems_are_told_at_once(folder: Path) -> None:
    lines = told(
        """\
data: {train: exmaples, held_out: 0.5}
lora:
  rank: 0
  rank: 8
  layers: {tpo: 3}
formats: {train: [chatml, 5], held_out: [zephyr, zephyr]}
optimizer: {warmup_steps: 5, betas: [0.9, 1], schedul: constant}
machine: {micro_batch: 4}
batch_size: 6
watch: 5
""",
        "hub.repoo=me/it",
        "seed=[",
        "seed",
    )
    wanted = [
        ("x.yaml:1", "data.train is exmaples, where there is nothing."),
        ("x.yaml:1", "data.held_out is 0.5."),
        ("x.yaml:3", "lora.rank is 0."),
        ("x.yaml:4", "lora.rank is written twice, first on line 3."),
        ("x.yaml:5", "lora.layers is {tpo: 3}."),
        ("x.yaml:6", "formats.train[1] is 5."),
        ("x.yaml:6", "formats.held_out names zephyr twice."),
        ("x.yaml:7", "optimizer.warmup_steps is 5, which the schedule constant ignores."),
        ("x.yaml:7", "optimizer.betas[1] is 1."),
        ("x.yaml:7", "optimizer.schedul is not a setting."),
        ("x.yaml:8", "machine.micro_batch is 4, which does not divide batch_size 6."),
        ("x.yaml:10", "watch is 5, not settings."),
        ("x.yaml  ", "base is missing."),
        ("--set hub.repoo=me/it", "hub.repoo is not a setting."),
        ("--set seed=[", "this is not YAML"),
        ("--set seed", "this sets nothing."),
    ]
    missing = [one for one in wanted if not any(line.startswith(one[0]) and one[1] in line for line in lines)]
    assert not missing, "\n".join(lines)
    assert len(lines) == len(wanted), "\n".join(lines)


def test_every_problem_says_what_to_do(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("x.yaml", ["lora=5", "data.train=", "epochs=0", "formats.train=[]", "hub.repo=x", "report_to=[csv]"])
    assert len(caught.value.problems) == 6
    assert all(problem.what.strip().endswith(".") and problem.remedy.strip() for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("setting", "refused"),
    [
        ("lora.rank", "0 | 513 | 8.5 | true | null"),
        ("lora.alpha", "0 | -1 | .nan | .inf"),
        ("lora.dropout", "1 | -0.1"),
        ("lora.layers", "{top: 0} | none | [] | {} | {top: 1, bottom: 2}"),
        ("lora.targets", "[] | q_proj | [q_proj, q_proj] | ['']"),
        ("data.held_out", "0.35 | -0.1 | nowhere.jsonl | ''"),
        ("data.replay", "{} | {path: examples} | {path: examples, share: 0} | {path: nowhere, share: 0.1} | 3"),
        ("optimizer.learning_rate", "0 | -1e-7 | 2 | fast"),
        ("optimizer.betas", "[0.9] | [0.9, 1.0] | [-0.1, 0.9] | 0.9 | [0.9, 0.9, 0.9]"),
        ("optimizer.name", "adam | AdamW"),
        ("optimizer.warmup_steps", "-1 | 0.1"),
        ("regularise.goldfish", "1 | 0 | 2.5"),
        ("formats.sampled", "1.1 | -0.1"),
        ("formats.train", "[] | chatml | [chatml, chatml] | {chatml: 1}"),
        ("epochs", "0 | 100001 | 1e2"),
        ("batch_size", "0"),
        ("watch.every", "0 | never"),
        ("watch.keep.max_gib", "0"),
        ("machine.micro_batch", "0 | all"),
        ("machine.activation_checkpointing", "no | 1"),
        ("hub.repo", "name | a/b/c | a b/c"),
        ("seed", "-1 | 4294967296"),
        ("report_to", "wandb | [mlflow] | [wandb, wandb]"),
    ],
)
def test_bounds_protect(folder: Path, setting: str, refused: str) -> None:
    for value in refused.split(" | "):
        lines = told(SHORT, f"{setting}={value}")
        assert lines, f"{setting}={value} was accepted"
        assert all(line.startswith(f"--set {setting}") for line in lines), lines


def test_settings_that_clash_are_refused(folder: Path) -> None:
    line = only(SHORT, "formats.held_out=[chatml]")
    assert "formats.held_out names chatml, which is also trained." in line
    line = only(SHORT + "optimizer:\n  warmup_steps: 10\n")
    assert line.startswith("x.yaml:5  ")
    assert "constant_with_warmup" in line
    assert told(SHORT, "optimizer={schedule: constant_with_warmup, warmup_steps: 10}") == []
    assert "Write 3 or auto." in only(SHORT + "batch_size: 6\nmachine: {micro_batch: 4}\n")
    assert told(SHORT, "batch_size=6", "machine.micro_batch=3") == []


def test_a_clash_is_not_blamed_on_a_wrong_value(folder: Path) -> None:
    assert "batch_size is 0." in only(SHORT + "batch_size: 0\nmachine: {micro_batch: 4}\n")


def test_duplicate_keys_name_both_lines(folder: Path) -> None:
    line = only(SHORT + "epochs: 5\nseed: 1\nepochs: 6\n")
    assert line == "x.yaml:6  epochs is written twice, first on line 4.  Keep one of the two."


def test_python_tags_are_refused_without_a_traceback(folder: Path) -> None:
    for tag in ("!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!own 1", "!!binary aGk="):
        assert only(SHORT + f"revision: {tag}\n").startswith("x.yaml:4  tags (`!...`) are not read.")


def test_cyclic_anchors_and_alias_bombs_are_refused(folder: Path) -> None:
    assert only(SHORT + "watch: &a {prompts: [*a]}\n").startswith("x.yaml:4  anchors and aliases")
    bomb = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(50))
    assert only(bomb).startswith("x.yaml:1  anchors and aliases")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "x.yaml  the file is empty."),
        (b"# only a comment\n", "x.yaml  the file is empty."),
        (b"- a\n- b\n", "x.yaml:1  the file holds a list, not settings."),
        (b"pocket\n", "x.yaml:1  the file holds a single value, not settings."),
        (b"lora:\n\trank: 8\n", "x.yaml:2  a tab where YAML wants spaces."),
        (b"base: pocket\n---\nbase: pocket\n", "x.yaml:2  a second document begins here."),
        (b"base: pocket\ndata: [\n", "x.yaml:3  this is not YAML:"),
        (b"base: a: b\n", "x.yaml:1  this is not YAML:"),
        (b"\xef\xbb\xbfbase: pocket\n", "x.yaml:1  the file begins with a byte order mark."),
        ("base: pocket\n".encode("utf-16"), "x.yaml:1  the file is UTF-16 or UTF-32."),
        ("base: pocket\n".encode("utf-16-le"), "x.yaml:1  the file holds a zero byte."),
        ("base: pocket\nx: é\n".encode("latin-1"), "x.yaml:2  byte 0xe9 is not UTF-8."),
        (b"base: pocket\n\nx: \0\n", "x.yaml:3  the file holds a zero byte."),
        (b"base: pocket\nx: \x07\n", "x.yaml:2  the character U+0007 cannot stand in YAML."),
        (b'base: "\\ud800"\n', "x.yaml:1  this text holds a character no program can use."),
        (b'base: pocket\nx: "\\Uffffffff"\n', "x.yaml:2  this is not YAML:"),
        (b"? [a]\n: b\n", "x.yaml:1  a list or a mapping cannot be a key."),
        (b"x: " + b"[" * 10_000, "x.yaml:1  nested more than 20 deep."),
        (b"x: " + b"a" * (1 << 20), "x.yaml  the file is larger than 1 MiB."),
    ],
)
def test_files_that_are_no_recipe_say_why(folder: Path, text: bytes, said: str) -> None:
    line = only(text)
    assert line.startswith(said), line
    assert line.count("  ") == 2, line  # place, what, remedy


def test_a_recipe_that_is_not_there_is_no_traceback(folder: Path) -> None:
    for path in ("y.yaml", "examples", "a\0b", "x.yaml/y", "y" * 5000):
        with pytest.raises(UserError):
            load(path)


# --- --set and paths


def test_set_enters_before_validation(folder: Path) -> None:
    assert told(SHORT + "lora: {rank: 0}\n", "lora.rank=8") == []
    assert load("x.yaml", ["lora.rank=8"]).lora.rank == 8
    Path("x.yaml").write_text(SHORT)
    assert load("x.yaml", ["lora.layers.top=3"]).lora.layers == recipe.Top(top=3)
    assert only(SHORT, "lora.rank=0").startswith("--set lora.rank=0  lora.rank is 0.")
    assert only(SHORT, "lora.rnak=8") == "--set lora.rnak=8  lora.rnak is not a setting.  Did you mean lora.rank?"


def test_set_of_a_section_leaves_its_other_settings(folder: Path) -> None:
    (folder / "x.yaml").write_text(SHORT + "lora: {rank: 4, alpha: 4}\n")
    lora = load("x.yaml", ["lora={rank: 8}"]).lora
    assert (lora.rank, lora.alpha) == (8, 4)


def test_paths_are_relative_to_the_recipe_and_in_set_to_the_working_folder(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "x.yaml").write_text("base: pocket\ndata: {train: ../examples, intended: ../own.jsonl}\n")
    loaded = load("recipes/x.yaml")
    assert (loaded.data.train, loaded.data.intended) == (str(folder / "examples"), str(folder / "own.jsonl"))
    assert load("recipes/x.yaml", ["data.train=own.jsonl"]).data.train == str(folder / "own.jsonl")
    assert load("recipes/x.yaml", [f"base={folder}"]).base == str(folder)


def test_hub_ids_stay_what_they_are(folder: Path) -> None:
    loaded = load("x.yaml", ["base=mistralai/Mistral-7B-v0.1", "data.train=someone/some-data"])
    assert (loaded.base, loaded.data.train) == ("mistralai/Mistral-7B-v0.1", "someone/some-data")
    (folder / "someone" / "some-data").mkdir(parents=True)
    assert load("x.yaml", ["data.train=someone/some-data"]).data.train == str(folder / "someone" / "some-data")


def test_a_path_that_leads_nowhere_names_what_is_near(folder: Path) -> None:
    line = only(SHORT.replace("examples", "exmaples"))
    assert line == (f"x.yaml:3  data.train is exmaples, where there is nothing.  Did you mean {folder / 'examples'}?")
    (folder / "sets" / "one").mkdir(parents=True)
    assert "Did you mean" in only(SHORT, "data.train=sets/oen")  # beside a folder `sets` this is no Hub id
    assert "base is mistral, where there is nothing." in only(SHORT, "base=mistral")


def test_formats_of_ones_own_are_files_beside_the_recipe(folder: Path) -> None:
    (folder / "mine.yaml").touch()
    assert load("x.yaml", ["formats.train=[chatml, mine.yaml]"]).formats.train == ("chatml", str(folder / "mine.yaml"))
    assert "Did you mean" in only(SHORT, "formats.held_out=[mein.yaml]")


# --- the resolved recipe


def test_resolved_recipe_loads_back_the_same(folder: Path) -> None:
    sets = ["revision='1e5'", "lora.layers.top=3", "optimizer.learning_rate=1e-7", "data.held_out=own.jsonl"]
    loaded = load("x.yaml", [*sets, 'watch.prompts=["no", "a: b # c", "é\\n\\u2028", "", " x", "0x1F", "null", "~"]'])
    (folder / "recipe.yaml").write_text(resolved_yaml(loaded), encoding="utf-8")
    assert load("recipe.yaml") == loaded
    (folder / "own.jsonl").unlink()
    assert load_resolved("recipe.yaml") == loaded


@effort(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_any_text_survives_being_written_out(prompts: list[str]) -> None:
    assert yamlfile.parse(yamlfile.dump({"prompts": prompts}), "x").data == {"prompts": tuple(prompts)}


def test_only_what_may_change_may_change(folder: Path) -> None:
    old = load("x.yaml")
    free = ["epochs=900", "watch.stop_at=never", "hub.repo=me/it", "report_to=[wandb]", "machine.micro_batch=1"]
    assert changed(old, load("x.yaml", free)) == []
    assert fingerprint(old) == fingerprint(load("x.yaml", free))
    new = load("x.yaml", ["lora.rank=8", "formats.held_out=[]", "lora.layers.top=2"])
    assert changed(old, new) == [
        "lora.rank was 16, is 8",
        "lora.layers was all, is {top: 2}",
        "formats.held_out was [zephyr, guanaco, mistral-v1, openchat-3.5, xml-tags], is []",
    ]
    assert fingerprint(old) != fingerprint(new)


def test_epochs_may_change_only_under_a_constant_rate(folder: Path) -> None:
    linear = load("x.yaml", ["optimizer.schedule=linear"])
    longer = load("x.yaml", ["optimizer.schedule=linear", "epochs=900"])
    assert changed(linear, longer) == ["epochs was 600, is 900"]
    assert fingerprint(linear) != fingerprint(longer)


def test_a_recipe_cannot_be_changed_after_loading(folder: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("x.yaml").epochs = 3


# --- help


def test_every_setting_has_a_meaning() -> None:
    for one in settings():
        assert one.type, one.key
        assert 20 < len(one.meaning) < 120, one.key
        assert one.meaning.endswith("."), one.key
        assert "\n" not in one.meaning, one.key
    assert [one.key for one in settings() if one.default is None] == [
        "base",
        "data.train",
        "data.replay.path",
        "data.replay.share",
    ]


def test_every_default_in_the_help_can_be_typed(folder: Path) -> None:
    sets = [f"{one.key}={one.default}" for one in settings() if one.default is not None]
    assert load("x.yaml", sets) == load("x.yaml")


def test_the_schema_for_editors_knows_every_setting() -> None:
    schema = json.dumps(recipe.json_schema())
    for one in settings():
        assert f'"{one.key.rpartition(".")[2]}"' in schema
        assert json.dumps(one.meaning) in schema


def test_a_blamed_key_is_placed_where_it_was_written(folder: Path) -> None:
    (folder / "x.yaml").write_text(SHORT + "formats:\n  train:\n    - chatml\n    - alpcaa\n")
    keys = [("formats", "train", 1), ("formats", "held_out"), ("seed",)]
    told = recipe.placed([Problem("x", "y", key=key) for key in keys], "x.yaml", ["seed=3"])
    assert [(one.file, one.line) for one in told] == [(Path("x.yaml"), 7), (Path("x.yaml"), 4), ("--set seed=3", None)]
    elsewhere = Problem("x", "y", "data.md", 3, key=("seed",))
    assert recipe.placed([elsewhere, Problem("x", "y")], "x.yaml") == [elsewhere, Problem("x", "y")]


def test_what_holds_of_a_broken_recipe_is_still_read(folder: Path) -> None:
    text = SHORT + "epochs: 0\nlora: {rank: x, alpha: 4}\nformats: {train: [alpaca], held_out: [alpaca]}\n"
    (folder / "x.yaml").write_text(text)
    draft = recipe.read("x.yaml")
    assert len(draft.problems) == 3
    assert draft.left_out == {"epochs", "lora.rank"}
    assert (draft.recipe.lora.alpha, draft.recipe.formats.train, draft.recipe.formats.held_out) == (4, ("alpaca",), ())
    (folder / "x.yaml").write_text("epochs: 0\n")
    assert recipe.read("x.yaml").left_out == {"base", "data", "epochs"}


# --- whatever a file holds


def harmless(raw: bytes, sets: list[str], folder: Path) -> None:
    path = folder / "fuzz.yaml"
    path.write_bytes(raw)
    problems = []
    try:
        load(path, sets)
    except UserError as error:
        problems = error.problems
    for problem in problems:
        str(problem).encode()  # a terminal can show it
        assert problem.what
        assert problem.remedy


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


ODDITIES = r"""- |? |: |&a |*a|!!python/x |--- |{|}|[|]|'|"|>|#|%YAML 9|1e999|0x|.nan|null|{}|[]|\|"\ud800"|top|é"""
FRAGMENTS = st.sampled_from([*CONTRACT.split(), *ODDITIES.split("|"), "|\n", "\n", "  ", "\t", "---\n", "\x85"])


@effort(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_never_a_traceback(fuzz: Path, raw: bytes) -> None:
    harmless(raw, [], fuzz)


@effort(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(CONTRACT)), st.integers(0, 40), FRAGMENTS), max_size=6))
def test_mutated_recipes_are_never_a_traceback(fuzz: Path, edits: list[tuple[int, int, str]]) -> None:
    text = CONTRACT
    for start, length, fragment in edits:
        text = text[:start] + fragment + text[start + length :]
    harmless(text.encode(), [], fuzz)


@effort(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([one.key for one in settings()] + ["", "a", "lora", "data.train.x"]), st.text() | FRAGMENTS)
def test_arbitrary_sets_are_never_a_traceback(fuzz: Path, key: str, value: str) -> None:
    harmless(SHORT.encode(), [f"{key}={value}", value], fuzz)
