"""A recipe is read exactly or refused with one helpful sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from make_schema import json_schema, keys_page

from cifar_dist.losses.registry import LOSSES
from cifar_dist.recipe.diff import flatten, recipe_diff, seed_free_config
from cifar_dist.recipe.load import load_recipe, validate
from cifar_dist.recipe.schema import Recipe, to_dict, to_yaml
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.strict_yaml import parse_yaml
from cifar_dist.utils.suggest import known_keys

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_fit_the_schema(path: Path) -> None:
    recipe = load_recipe(path)
    prefix = f"{path.parent.name}_" if path.parent.name in ("kd", "cifar10") else ""
    assert recipe.name == prefix + path.stem
    assert recipe.run.micro_batches is not None, (
        "a published recipe says its number of micro-batches"
    )
    assert len([line for line in path.read_text().splitlines() if line[0] != "#"]) <= 30
    jsonschema.validate(parse_yaml(path.read_text(), where=str(path)), json_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_name_the_schema_for_editors(path: Path) -> None:
    key, _, schema = path.read_text().partition("\n")[0].partition("=")
    assert key == "# yaml-language-server: $schema"
    assert (path.parent / schema).resolve() == ROOT / "recipes/schema.json"


def test_schema_on_disk_is_up_to_date() -> None:
    assert json.loads((ROOT / "recipes/schema.json").read_text()) == json_schema(), (
        "run `make schema`"
    )


def test_every_key_has_a_description() -> None:
    schema = json_schema()
    for name, definition in {"Recipe": schema, **schema["$defs"]}.items():
        for key, content in definition["properties"].items():
            assert content["description"], f"{name}.{key}: write a comment after the field"
    losses = schema["$defs"]
    assert losses["CrossEntropy"]["properties"]["weight"] == losses["Dist"]["properties"]["weight"]


def test_page_of_keys_is_up_to_date_and_complete() -> None:
    page = (ROOT / "docs/recipe_keys.md").read_text()
    assert page == keys_page(json_schema()), "run `make schema`"
    for key in flatten(to_dict(Recipe(name="a"))):
        assert f"| `{key}` |" in page


def test_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    for path in SHIPPED:
        recipe = load_recipe(path)
        again = tmp_path / path.name
        again.write_text(to_yaml(recipe))
        assert load_recipe(again) == recipe
        assert validate(to_dict(recipe), where="resolved") == recipe


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nrun: {epoch: 3}", ["run.epoch", "run.epochs"]),
        ("name: a\nepochs: 3", ["epochs", "run.epochs"]),
        ("name: a\nrun: {gradient_accumulation_steps: 4}", ["run.micro_batches"]),
        ("name: a\nmixed_precision: bf16", ["run.precision"]),
        ("name: a\nlearning_rate: 0.1", ["optim.lr"]),
        ("name: a\nrun: {epochs: 3, epochs: 4}", [":2:", "given twice"]),
        ("name: a\nrun: {epochs: '3'}", ["run.epochs", "integer"]),
        ("name: a\nrun: {epochs: 3.5}", ["run.epochs", "integer"]),
        ("name: a\nrun: {epochs: 010}", ["run.epochs", "integer"]),
        ("name: a\nrun: {epochs: 0}", ["run.epochs", "greater than 0"]),
        ("name: a\nrun: {epochs: true}", ["run.epochs", "integer"]),
        (
            "name: a\naugment: {hflip: no}",
            ["yaml: augment.hflip: write true or false, or 'alternate' (got 'no')"],
        ),
        ("name: a\naugment: {hflip: 1}", ["augment.hflip: write true or false"]),
        ("name: a\naugment: {vflip: yes}", ["augment.vflip: write true or false (got 'yes')"]),
        ("name: a\nrun: {compile: 'True'}", ["run.compile: write true or false (got 'True')"]),
        (
            "name: a\naugment: {views: 0}",
            ["yaml: augment.views: Input should be greater than 0, or 'all' (got 0)"],
        ),
        ("name: a\noptim: {betas: [0.9]}", ["optim.betas.1: Field required"]),
        ("name: a\noptim: {lr: -1e-3}", ["optim.lr", "greater than 0"]),
        ("name: a\noptim: {lr: .nan}", ["optim.lr"]),
        ("name: a\nmodel: {drop_rate: 1.0}", ["model.drop_rate", "less than 1"]),
        ("name: a\nmodel: {stem: tiny}", ["model.stem", "imagenet", "small"]),
        ("name: a\nmodel: {pretrained: true, weights: x.pt}", ["pretrained", "weights"]),
        ("name: a\nrun: {batch_size: 2, micro_batches: 3}", ["micro_batches=3", "batch_size=2"]),
        ("name: a\nlosses: {arcface: {}}", ["losses.arcface", "model.head=cosine"]),
        ("name: a\nlosses: {sphereface: {}}", ["losses.sphereface", "model.head=cosine"]),
        ("name: a\nmodel: {head: cosine}", ["(cross_entropy)", "model.head=linear", "arcface"]),
        (
            "name: a\nmodel: {head: cosine}\nlosses: {bce: {}, supcon: {}, cosface: {weight: 0}}",
            ["too small for a softmax", "model.head=linear"],
        ),
        (
            "name: a\nmodel: {head: cosine}\nlosses: {l_softmax: {}}",
            ["losses.l_softmax", "model.head=linear"],
        ),
        ("name: a\nlosses: {supcon: {}, triplet: {}}", ["(triplet, supcon)", "add cross_entropy"]),
        ("name: a\nlosses: {supcon: {}, bce: {weight: 0}}", ["(bce, supcon)", "add cross_entropy"]),
        (
            "name: a\nlosses: {supcon: {}, bce: {}}\naugment: {cutmix: 1.0}",
            ["losses.supcon", "cutmix and resizemix"],
        ),
        ("name: a\nlosses: {sphereface: {margin: 1.5}}", ["losses.sphereface.margin", "integer"]),
        ("name: a\nlosses: {arcfase: {}}", ["losses.arcface"]),
        ("name: a\nlosses: {}", ["losses"]),
        ("name: a\nlosses: {distill: {}}", ["losses.distill", "teacher.run="]),
        ("name: a\nlosses: {cross_entropy: {warmup_epochs: 2}}", ["losses.cross_entropy.warmup"]),
        (
            "name: a\nlosses: {dkd: {warmup_epochs: 2.5}}\nteacher: {run: b}",
            ["losses.dkd.warmup_epochs", "integer"],
        ),
        (
            "name: a\nteacher: {run: runs/b}",
            ["no loss uses the teacher", "dkd, dist, wttm, mlkd, logit_mse"],
        ),
        ("name: a\nteacher: {placement: sharded}", ["teacher.run", "required"]),
        ("name: a\nteacher: {run: runs/b, placement: split}", ["teacher.placement", "sharded"]),
        ("name: a\nteacher: {run: runs/b, weight: 0}", ["teacher.weight", "greater than 0"]),
        (
            "name: a\nlosses: {distill: {}}\nteachers: [{run: b, plcement: whole}]",
            ["teachers.0.plcement"],
        ),
        (
            "name: a\nlosses: {dkd: {}}\nteacher: {run: b}\nteachers: [{run: c}, {run: d}]",
            ["teacher and teachers", "remove one"],
        ),
        ("run: {epochs: 3}", ["name", "required"]),
        ("name: ../../etc", ["name", "letters"]),
        ("name: a\nrun: &x {epochs: 3}\ndata: *x", ["aliases", "not allowed"]),
        ("name: a\n<<: {run: {epochs: 3}}", ["<<"]),
        ("- a\n- b", ["mapping"]),
        ("", ["mapping"]),
        ("name: a\nrun: [1", ["recipe.yaml"]),
        ("name: !!python/object/apply:os.system ['true']", ["could not determine"]),
        ("name: !!binary aGVsbG8=", ["could not determine"]),
        ("name: a\ntracking: {tags: !!set {b}}", ["could not determine"]),
        ("name: !!timestamp 2026-01-01", ["could not determine"]),
        ("name: a\naugment: {hflip: !!bool maybe}", ["maybe"]),
        ("name: a\noptim: {lr: 1e999}", ["not finite"]),
        ("name: a\nrun: !!map [1]", ["expected a mapping"]),
        ("name: a\noptim: {lr: !!float '" + "1:" * 400 + "1'}", ["is not a valid float"]),
        ("name: a\noptim: {lr: !!float '1:30'}", ["'1:30' is not a valid float", "remove the tag"]),
        ("name: a\noptim: {lr: !!float 1_0}", ["'1_0' is not a valid float"]),
        ("name: a\noptim: {lr: !!float nan}", ["'nan' is not a valid float"]),
        ("name: a\naugment: {hflip: !!bool yes}", ["'yes' is not a valid bool"]),
        ('name: a\nrun: {epochs: !!int "10\\n"}', ["is not a valid int"]),
        ("name: a\naveraging: !!null x", ["'x' is not a valid null"]),
        ("name: a\nrun: {epochs: !!int 010}", ["'010' is not a valid int", "remove the tag"]),
        ("name: a\nrun: {epochs: !!int '1:30'}", ["'1:30' is not a valid int"]),
        ("name: a\nrun: {timeout_seconds: 2}", ["timeout_seconds", "at least 4"]),
        ("name: a\noptim: {milestones: [3]}", ["milestones", "multistep"]),
        (
            "name: a\nmodel: {head: cosine}\nlosses: {arcface: {margin: 28.6}}",
            ["losses.arcface.margin", "less than 3.14"],
        ),
        ("name: a\ndata: {path: ~/data}", ["'~/data'", "the full path"]),
        ("name: a\ndata: {path: $SCRATCH/data}", ["'$SCRATCH/data': $ is not", "the full path"]),
        ("name: a\ndata: {path: /scratch/$USER}", ["'/scratch/$USER'", "the full path"]),
        ("name: a\nrun: {output_dir: 'a-${USER}'}", ["'a-${USER}'", "the full path"]),
        (
            "name: a\nmodel: {image_size: 64, progressive_resize: {start: 32, epochs: 9}}\nrun: {epochs: 8}",
            ["progressive_resize.epochs=9", "run.epochs=8"],
        ),
        (
            "name: a\naugment: {hflip: alternate, views: 3}",
            ["hflip: alternate", "even number of views"],
        ),
        ("name: a\naugment: {cutout: 193}", ["augment.cutout", "192"]),
        ("name: a\naugment: {crop_padding: 96}", ["augment.crop_padding", "96"]),
        ("name: a\naugment: {erasing: {area: [0.99, 1.0]}}", ["augment.erasing", "nothing"]),
        ("name: a\naugment: {erasing: {area: [1.0e-9, 1.0e-8]}}", ["nothing would be erased"]),
        ("name: a\naugment: {erasing: {area: [0.5, 0.9], ratio: [3, 9]}}", ["nothing would"]),
        ("name: a\noptim: {betas: [0.9, 1.0]}", ["optim.betas", "less than 1"]),
        (
            "name: a\nmodel: {progressive_resize: {start: 24, epochs: 3}}",
            ["progressive_resize.start=24", "progressive_resize.multiple=32"],
        ),
        (
            "name: a\ndata: {shuffle: false}\naugment: {repeated: 2}",
            ["augment.repeated", "data.shuffle"],
        ),
        ("name: a\n1: 2", ["not a string"]),
        ("[" * 30000, ["recipe.yaml"]),
        ("name: a\x00", ["recipe.yaml"]),
        ("# " + "x" * 70000, ["larger than"]),
    ],
)
def test_mistakes_are_refused_with_location_and_remedy(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    sentence = str(caught.value)
    assert "recipe.yaml" in sentence
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    text = "name: a\noptim: {lr: 1e-3, weight_decay: 5.0e-4, schedule: multistep, milestones: [60, 1.5e2]}"
    optim = load_recipe(write(tmp_path, text)).optim
    assert (optim.lr, optim.weight_decay, optim.milestones) == (1e-3, 5e-4, (60.0, 150.0))
    assert parse_yaml("[True, FALSE, Null, NULL]", where="here") == [True, False, None, None]
    words = parse_yaml("[no, yes, on, 0x10, 1_000, 12:30, 2026-01-01]", where="here")
    assert words == ["no", "yes", "on", "0x10", "1_000", "12:30", "2026-01-01"]


def test_overrides_change_and_open_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nrun: {epochs: 3}")
    overrides = ["run.epochs=5", "averaging.decay=0.99", "name=b", "losses.cross_entropy.weight=2"]
    recipe = load_recipe(path, overrides)
    assert (recipe.run.epochs, recipe.name) == (5, "b")
    assert recipe.averaging is not None
    assert recipe.averaging.decay == 0.99
    assert recipe.losses["cross_entropy"].weight == 2
    assert load_recipe(path, ["augment.hflip=True", "averaging=Null"]).augment.hflip is True
    for bad, word in (
        ("run.epochs", "section.key=value"),
        ("run.epochs.x=1", "not a section"),
        ("run.epoch=1", "run.epochs"),
        ("run.epochs=[1", "run.epochs"),
        ("data.path=$DATA", r"data\.path=.*the full path"),
    ):
        with pytest.raises(UserError, match=word):
            load_recipe(path, [bad])


def test_only_the_path_in_the_recipe_file_is_filled_with_data(tmp_path: Path) -> None:
    for text in ("name: a\ndata: {path: data/sample, source: sample}", "name: a"):
        path = write(tmp_path, text)
        own = load_recipe(path).data
        assert own.source is not None
        for overrides in ([f"data.path={own.path}"], ["data.val_size=500"]):
            assert load_recipe(path, overrides).data.source is not None
        assert load_recipe(path, ["data.path=data/sampel"]).data.source is None
        for both in (["data.source=x", "data.path=new"], ["data={path: new, source: x}"]):
            assert load_recipe(path, both).data.source == "x"


def test_placement_is_never_a_changed_recipe(tmp_path: Path) -> None:
    text = "name: a\nlosses: {dkd: {}}\nteachers: [{run: b}, {run: c}]"
    before = load_recipe(write(tmp_path, text), [f"run.output_dir={tmp_path}"])
    before.folder.mkdir()
    (before.folder / "recipe.yaml").write_text(to_yaml(before))
    first, second = before.teachers or ()
    cheaper = replace(first, placement="sharded", shard_over="node")
    assert recipe_diff(replace(before, teachers=(cheaper, second))) == []
    heavier = replace(second, weight=2.0)
    assert recipe_diff(replace(before, teachers=(first, heavier))) == [
        "teachers.1.weight: 1.0 -> 2.0"
    ]


def test_evaluation_interval_is_semantic_with_early_stopping(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def written(**run: object) -> Recipe:
        run |= {"output_dir": str(tmp_path)}
        return validate({"name": "a", "run": run, "data": {"val_size": 500}}, where="here")

    for stop, expected in ((None, []), (3, ["run.eval_every_epochs: 1 -> 2"])):
        before = written(early_stopping_patience=stop)
        after = written(early_stopping_patience=stop, eval_every_epochs=2)
        (tmp_path / "a/recipe.yaml").write_text(to_yaml(before))
        assert recipe_diff(after) == expected
        assert (seed_free_config(before) == seed_free_config(after)) == (stop is None)


@pytest.mark.parametrize(
    "change",
    [
        "run.epochs=3", "run.batch_size=500", "run.micro_batches=4", "run.precision=fp32", "run.seed=1",
        "run.grad_reduce_dtype=bf16", "run.deterministic=true", "data.shuffle=false", "data.val_size=500",
        "data.fraction=0.5", "data.long_tail.imbalance=10", "data.label_noise={kind: symmetric, rate: 0.1}",
        "losses={cross_entropy: {class_weights: balanced}}",
        "model.drop_rate=0.1", "augment.hflip=true", "augment.seed=1", "augment.albumentations=[{HorizontalFlip: {}}]",
        "optim.lr=0.1", "optim.weight_decay=0.1", "averaging.decay=0.9", "losses.bce.weight=1",
    ],
)  # fmt: skip
def test_what_changes_a_number_is_a_changed_recipe(tmp_path: Path, change: str) -> None:
    path = write(tmp_path, "name: a")
    output = f"run.output_dir={tmp_path}"
    before = load_recipe(path, [output])
    before.folder.mkdir()
    (before.folder / "recipe.yaml").write_text(to_yaml(before))
    actual = recipe_diff(load_recipe(path, [output, change]))
    name = change.partition("=")[0]
    assert any(line.startswith(name.rpartition(".")[0]) for line in actual), actual
    assert recipe_diff(load_recipe(path, [output, "run.threads=3", "data.path=elsewhere"])) == []


def test_missing_keys_of_an_older_recipe_have_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, "name: a\nlosses: {bce: {}}"), [f"run.output_dir={tmp_path}"]
    )
    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text("name: a\nlosses: {bce: {weight: 1.0}}\n")
    assert recipe_diff(recipe) == []
    for text in ("name: a", "name: a\nlosses: {bce: {}, cross_entropy: {}}"):
        (recipe.folder / "recipe.yaml").write_text(text)
        assert recipe_diff(recipe) != []  # a loss that is not named is none
    (recipe.folder / "recipe.yaml").write_text(
        "name: a\nlosses: {bce: {weight: 1.0}}\nrun: {old: 3}"
    )
    assert "run.old: 3 -> None" in recipe_diff(recipe)


def test_seed_free_config_ignores_only_seeds(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a")
    base = seed_free_config(load_recipe(path))
    for seeds in ("name=b", "run.seed=1", "run.micro_batches=2", "augment.seed=3"):
        assert seed_free_config(load_recipe(path, [seeds])) == base
    assert seed_free_config(load_recipe(path, ["optim.lr=1"])) != base
    noise = "data.label_noise={kind: symmetric, rate: 0.1, seed: %s}"
    first, second = (seed_free_config(load_recipe(path, [noise % seed])) for seed in (0, 1))
    assert first == second != base


def test_max_consecutive_skips(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a")
    for change, most in (
        ("run.seed=0", 1),
        ("run.on_nonfinite=skip", 20),
        ("run.precision=fp16", 20),
    ):
        assert load_recipe(path, [change]).run.max_consecutive_skips == most


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"name: a" + b" " * (1 << 16), "larger than"),
        (b"name: \xff", "as text"),
        (b"[]", "a mapping"),
    ],
)
def test_damaged_recipe_of_a_run_folder_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"a/recipe\.yaml: .*{why}"):
        recipe_diff(validate({"name": "a", "run": {"output_dir": str(tmp_path)}}, where="here"))


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "name: a")
    with pytest.raises(UserError, match=r"did you mean .*recipe\.yaml"):
        load_recipe(tmp_path / "recpie.yaml")


def test_every_known_key_is_in_a_resolved_recipe() -> None:
    names = ("affine", "color_jitter", "auto_augment", "rand_augment", "trivial_augment", "erasing")
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    said: set[str] = set()
    for head in ("linear", "cosine"):
        fitting: dict[str, object] = {
            name: {} for name, kind in LOSSES.items() if kind.head in (None, head)
        }
        everything = validate(
            {
                "name": "a",
                "augment": {**changes, "one_of": changes},
                "data": {
                    "label_noise": {"kind": "symmetric", "rate": 0.1},
                    "long_tail": {"imbalance": 10},
                },
                "averaging": {},
                "optim": {"sam": {}},
                "losses": fitting,
                "teacher": {
                    "run": "teacher.safetensors",
                    "model": {"progressive_resize": {"start": 32, "epochs": 1}},
                },
                "model": {"head": head, "progressive_resize": {"start": 32, "epochs": 1}},
            },
            where="here",
        )
        assert isinstance(everything, Recipe)
        said |= set(flatten(to_dict(everything)))
    known = known_keys(Recipe)
    leaves = {f"{section}.{name}".lstrip(".") for section in known for name in known[section]}
    assert leaves - known.keys() <= said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("run.shards=2", "run.micro_batches"),
        ("run.output=runs", "run.output_dir"),
        ("run.report_every_steps=5", "run.log_every_steps"),
        ("run.stop_after_epochs_without_gain=3", "run.early_stopping_patience"),
        ("run.reduce_precision=bf16", "run.grad_reduce_dtype"),
        ("run.graph=off", "run.cuda_graphs"),
        ("data.holdout=5000", "data.val_size"),
        ("ema.decay=0.9", "averaging"),
        ("model.growing.start=32", "model.progressive_resize"),
        ("model.second_size=48", "model.mixed_resolution"),
        ("augment.host=[]", "augment.albumentations"),
        ("augment.host_workers=2", "augment.workers"),
        ("augment.repeats=2", "augment.repeated"),
        ("augment.flip=true", "augment.hflip"),
        ("augment.vertical_flip=true", "augment.vflip"),
        ("augment.erasing.probability=0.5", "use p"),
        ("losses.dkd.target=1", "use alpha"),
        ("losses.dkd.others=8", "use beta"),
        ("losses.sphereface.softness=5", "use lambda_"),
    ],
)
def test_old_keys_name_the_new_ones(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key; use .*{new.removeprefix('use ')}"):
        load_recipe(write(tmp_path, "name: a"), [old])
