"""Directories and checkpoints of strangers: what they may not do, and what real ones are allowed to leave out."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import HUGINN, NATIVE, OURO, random_model, rewrite, same_weights, set_fields

from looplm.checkpoints import from_pretrained, load_checkpoint, save_checkpoint, save_pretrained
from looplm.cli import main
from looplm.errors import InputError
from looplm.model import Origin
from looplm.origin import pack_origin
from looplm.pretrained_folder import read_origin

CONFIGS = {"ouro": OURO, "huginn": HUGINN, "native": NATIVE}


@pytest.fixture
def folders(tmp_path):
    for name, config in CONFIGS.items():
        save_pretrained(random_model(config), tmp_path / name, num_loops=4)
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose content can be changed in any way."""
    model = random_model(OURO)
    model.origin = Origin(config={"model_type": "ouro", "total_ut_steps": 4}, files={"tokenizer.json": b"{}"})
    save_checkpoint(model, tmp_path / "good.ckpt")

    def change(edit):
        content = torch.load(tmp_path / "good.ckpt", weights_only=True)
        edit(content)
        torch.save(content, tmp_path / "bad.ckpt")
        return tmp_path / "bad.ckpt"

    return change


def refused(capsys, *arguments):
    """Run a command that must fail, fast, in one clear line."""
    started = time.monotonic()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert "\x1b" not in err
    assert len(err) < 1500
    assert time.monotonic() - started < 10
    return err


WRONG_NAMES = """../x.py|/tmp/x.py|
a/x.py|config.json|model.safetensors|model.safetensors.index.json|x|.x.py|tokenizer.bin|
tokenizer.PKL|tokenizer.safetensors|tokenizer\0.json|..||a\\b.py""".replace("\n", "").split("|")


@pytest.mark.parametrize("name", [*WRONG_NAMES, "tokenizer" * 40])
def test_a_checkpoint_can_only_carry_what_belongs_to_a_model(name, checkpoint, tmp_path, capsys):
    path = checkpoint(lambda c: c["origin"]["files"].update({name: torch.ones(3, dtype=torch.uint8)}))
    assert "`origin.files` must be named like" in refused(capsys, "export", path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ckpt", "good.ckpt"]
    with pytest.raises(InputError, match=r"`origin\.files` must be named like"):
        save_pretrained(random_model(OURO), tmp_path / "out", origin=Origin(config={}, files={name: b""}), num_loops=4)


class Thing:
    pass


BAD_CHECKPOINTS = {
    "config is a list": lambda c: c["origin"].update(config=[1]),
    "config of tensors": lambda c: c["origin"].update(config={"a": torch.zeros(1)}),
    "deep config": lambda c: c["origin"].update(config={"a": json.loads("[" * 90 + "]" * 90)}),
    "files is a list": lambda c: c["origin"].update(files=["x"]),
    "files of floats": lambda c: c["origin"].update(files={"tokenizer.json": torch.ones(2)}),
    "buffers of text": lambda c: c["origin"].update(buffers={"freqs_cis": "x"}),
    "dtype of numbers": lambda c: c["origin"].update(dtype=3),
    "origin is text": lambda c: c.update(origin="x"),
    "no weights": lambda c: c.update(state_dict={}),
    "weights of text": lambda c: c.update(state_dict={"model.a": "x"}),
    "a missing tensor": lambda c: c["state_dict"].pop("model.final_norm.weight"),
    "a wrong shape": lambda c: c["state_dict"].update({"model.final_norm.weight": torch.ones(9)}),
    "many layers": lambda c: c["hyper_parameters"]["config"].update(num_core_layers=300_000),
    "a huge width": lambda c: c["hyper_parameters"]["config"].update(width=2**40),
    "width of text": lambda c: c["hyper_parameters"]["config"].update(width="8"),
    "a huge number": lambda c: c["hyper_parameters"]["config"].update(width=10**5000),
    "no config": lambda c: c.pop("hyper_parameters"),
    "no object": lambda c: c.update(hyper_parameters=3),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line(name, checkpoint, tmp_path, capsys):
    path = checkpoint(BAD_CHECKPOINTS[name])
    assert str(path) in refused(capsys, "export", path, tmp_path / "out", "--num_loops", "4")
    assert not (tmp_path / "out").exists()


def test_what_torch_advises_is_not_passed_on(tmp_path, capsys):
    torch.save({"state_dict": Thing()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(b"nonsense")
    for name in ("a.ckpt", "b.ckpt"):
        error = refused(capsys, "export", tmp_path / name, tmp_path / "out")
        assert "is no checkpoint of looplm, or damaged" in error
        assert "weights_only" not in error
    long = "x" * 300
    for arguments in (("export", long, "out"), ("import", long, "out.ckpt"), ("export", long, "out", "--like", long)):
        refused(capsys, *arguments)


def architecture(**changes):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        set_fields(architecture={**fields["architecture"], **changes})(folder)

    return change


DEEP = "[" * 100_000 + "]" * 100_000
BAD_DIRECTORIES = [
    ("ouro", set_fields(rope_scaling=[1]), "`rope_scaling` must be an object"),
    ("ouro", set_fields(rope_parameters="x"), "`rope_parameters` must be an object"),
    ("ouro", set_fields(rope_parameters={"rope_theta": "x"}), "`rope_theta` must be a number"),
    ("ouro", set_fields(rope_parameters={"rope_theta": 5.0}), "`rope_theta` must be one number"),
    ("ouro", set_fields(rope_parameters={}, rope_scaling={"type": "linear", "factor": 2}), "only the default rotary"),
    ("ouro", set_fields(layer_types=3), "`layer_types` must be a list of `num_hidden_layers` 2"),
    ("ouro", set_fields(layer_types=["full_attention"]), "`layer_types` must be a list"),
    ("ouro", set_fields(layer_types=["full_attention", {}]), "`layer_types` must all be"),
    ("ouro", set_fields(total_ut_steps=0), "`total_ut_steps` must be >= 1"),
    ("ouro", set_fields(rms_norm_eps=float("inf")), "`rms_norm_eps` must be > 0 and finite"),
    ("ouro", set_fields(rope_theta=10**400), "`rope_theta` must be > 0 and finite"),
    ("ouro", set_fields(hidden_size=2**40), "`hidden_size` must be >= 1 and <"),
    ("ouro", set_fields(hidden_size=0), "`hidden_size` must be >= 1"),
    ("ouro", set_fields(num_attention_heads=-1), "`num_attention_heads` must be >= 1"),
    ("ouro", set_fields(num_hidden_layers=300_000, layer_types=None), "300000 layers"),
    ("ouro", set_fields(intermediate_size=2**30), "must have the shape"),
    ("ouro", set_fields(model_type=["ouro"]), "`model_type` must be one of"),
    ("ouro", lambda f: (f / "config.json").write_text(DEEP), "must not be nested"),
    ("ouro", lambda f: (f / "config.json").write_text('{"a": ' + DEEP[99_900:100_100] + "}"), "must not be nested"),
    ("ouro", lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), "is no JSON"),
    ("ouro", lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is no JSON"),
    ("huginn", set_fields(n_embd=0), "`n_embd` must be >= 1"),
    ("huginn", set_fields(block_size=2**30), "'freqs_cis' must have the shape"),
    ("huginn", set_fields(n_layers_in_recurrent_block=300_000, n_layers=300_002), "300002 layers"),
    ("huginn", set_fields(mean_recurrence=0), "`mean_recurrence` must be >= 1"),
    ("native", set_fields(architecture=3), "`architecture` must be an object"),
    ("native", architecture(width=8.0), "`width` must be of type int, got 8.0"),
    ("native", architecture(width="8"), "`width` must be of type int, got '8'"),
    ("native", architecture(use_bias=1), "`use_bias` must be of type bool, got 1"),
    ("native", architecture(num_heads=True), "`num_heads` must be of type int, got True"),
    ("native", architecture(norm_eps="x"), "`norm_eps` must be of type float"),
    ("native", architecture(norm_eps=float("inf")), "`norm_eps` must be finite"),
    ("native", architecture(width=2**40), "asks for a matrix of more than"),
    ("native", architecture(ffn_width=2**40), "asks for a matrix of more than"),
    ("native", architecture(num_heads=2**40, attention_head_width=1), "asks for a matrix of more than"),
    ("native", architecture(num_core_layers=300_000), "300000 layers"),
    ("native", architecture(norm_type=[]), "`norm_type` must be one of"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD_DIRECTORIES)
def test_a_malformed_directory_is_refused_in_one_line(kind, change, message, folders, capsys):
    change(folders / kind)
    error = refused(capsys, "import", folders / kind, folders / "out.ckpt")
    assert message in error
    assert not (folders / "out.ckpt").exists()


@pytest.mark.parametrize("suffix", [".pkl", ".PKL", ".pt", ".pth", ".th", ".bin", ".ckpt", ".joblib", ".Pickle"])
def test_pickles_are_refused_by_their_ending(suffix, folders, capsys):
    (folders / "ouro" / f"x{suffix}").write_bytes(b"x")
    assert "holds pickle files" in refused(capsys, "import", folders / "ouro", folders / "out.ckpt")


def test_weights_that_nothing_names_and_names_that_are_none_are_refused(tmp_path, capsys):
    save_pretrained(random_model(OURO), tmp_path / "one", num_loops=4)
    save_pretrained(random_model(OURO), tmp_path / "many", num_loops=4, max_shard_bytes=1500)
    for folder in (tmp_path / "one", tmp_path / "many"):
        save_file({"a": torch.zeros(1)}, folder / "model-00009-of-00009.Safetensors")
        assert "holds weights beside its own" in refused(capsys, "import", folder, tmp_path / "out.ckpt")
        (folder / "model-00009-of-00009.Safetensors").unlink()
    index = tmp_path / "many" / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for file in ("x" * 300, "a\0b", "../many/" + good["model.norm.weight"], "/x", 3, [], ""):
        index.write_text(json.dumps({"weight_map": {**good, "model.norm.weight": file}}))
        assert "files of the same directory" in refused(capsys, "import", tmp_path / "many", tmp_path / "out.ckpt")
    for content, message in (
        (DEEP, "must not be nested"),
        ("{}", "`weight_map`"),
        ('{"weight_map": []}', "`weight_map`"),
    ):
        index.write_text(content)
        assert message in refused(capsys, "import", tmp_path / "many", tmp_path / "out.ckpt")


def round_trip(folder, root, *options):
    assert main(["import", str(folder), str(root / "a.ckpt")]) == 0
    assert main(["export", str(root / "a.ckpt"), str(root / "again"), *options]) == 0
    return {path.name: path.read_bytes() for path in (root / "again").iterdir()}


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, None])
def test_a_huginn_is_given_back_byte_by_byte_with_its_table_or_without(weights, table, tmp_path):
    folder = tmp_path / "huginn"
    save_pretrained(random_model(HUGINN).to(weights), folder, num_loops=4)

    def change(tensors):
        stored = tensors.pop("freqs_cis")
        # A last bit that our formula would not give.
        tensors.update({} if table is None else {"freqs_cis": (stored + 2**-23).to(table)})

    rewrite(folder, change)
    fields = json.loads((folder / "config.json").read_text())
    del fields["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "raven_modeling_minimal.py").write_text("raise SystemExit('must not run')")
    (folder / "raven_config_minimal.py").write_bytes(b"")
    (folder / "tokenizer.model").write_bytes(b"")
    assert {p.dtype for p in from_pretrained(folder).parameters()} == {weights}
    assert round_trip(folder, tmp_path) == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_type_is_named_where_it_changed(folders):
    folder = folders / "ouro"
    set_fields(dtype="float32")(folder)  # both names
    files = round_trip(folder, folders, "--dtype", "bfloat16")
    fields = json.loads(files["config.json"])
    assert (fields["dtype"], fields["torch_dtype"]) == ("bfloat16", "bfloat16")
    before, after = (load_file(f / "model.safetensors") for f in (folder, folders / "again"))
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in before.items())
    assert read_origin(folders / "again").dtype == "bfloat16"


def test_real_configs_may_leave_out_what_has_a_default(folders):
    expected = from_pretrained(folders / "ouro")
    for value in ("absent", None):
        fields = json.loads((folders / "ouro" / "config.json").read_text(encoding="utf-8-sig"))
        for name in (
            "rms_norm_eps",
            "tie_word_embeddings",
            "initializer_range",
            "hidden_act",
            "layer_types",
            "head_dim",
        ):
            fields.pop(name, None)
            fields.update({} if value == "absent" else {name: value})
        fields.update(attention_dropout=0.1, attention_bias=None, use_sliding_window=None)
        (folders / "ouro" / "config.json").write_text("\ufeff" + json.dumps(fields), encoding="utf-8")
        model = from_pretrained(folders / "ouro")
        assert model.config == expected.config
        assert same_weights(model, expected)
        shutil.rmtree(folders / "again", ignore_errors=True)
        (folders / "a.ckpt").unlink(missing_ok=True)
        assert json.loads(round_trip(folders / "ouro", folders)["config.json"]) == fields
    for changes, theta in (
        ({"rope_theta": None}, 10_000.0),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": None}, 5e5),
    ):
        fields = {**fields, "rope_parameters": None, **changes}
        (folders / "ouro" / "config.json").write_text(json.dumps(fields))
        assert from_pretrained(folders / "ouro").config.rope_theta == theta
    set_fields(norm_eps=None, rope_base=None, tie_embeddings=None, qk_bias=None)(folders / "huginn")
    assert from_pretrained(folders / "huginn").config == HUGINN.__class__.from_dict(
        {**HUGINN.to_dict(), "init_std": from_pretrained(folders / "huginn").config.init_std}
    )


def test_empty_directories_of_every_kind_can_be_exported_into(folders, monkeypatch, capsys):
    save_checkpoint(from_pretrained(folders / "ouro"), folders / "a.ckpt")
    (folders / "empty").mkdir()
    (folders / "real").mkdir()
    (folders / "link").symlink_to(folders / "real")
    for name in ("empty", "link", "new/deep"):
        assert main(["export", str(folders / "a.ckpt"), str(folders / name)]) == 0
    assert (folders / "link").is_symlink()
    assert same_weights(from_pretrained(folders / "real"), load_checkpoint(folders / "a.ckpt"))
    (folders / "here").mkdir()
    monkeypatch.chdir(folders / "here")
    capsys.readouterr()
    for name in (".", "../here"):
        assert "must not be the current directory" in refused(capsys, "export", folders / "a.ckpt", name)
    assert list(Path.cwd().iterdir()) == []
    refused(capsys, "export", folders / "a.ckpt", "x" * 300)
    refused(capsys, "import", folders / "ouro", "x" * 300)
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]


def test_what_an_origin_holds_is_packed_as_it_is():
    origin = Origin(config={"a": [1]}, files={"vocab.txt": b"", "a.py": b"x"}, dtype="float16", buffers={})
    content = pack_origin(origin)
    assert (
        Origin(
            config=content["origin"]["config"],
            files={name: data.numpy().tobytes() for name, data in content["origin"]["files"].items()},
            dtype=content["origin"]["dtype"],
        )
        == origin
    )
