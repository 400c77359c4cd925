import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from looplm.checkpoints import from_pretrained, load_checkpoint, save_checkpoint, save_pretrained
from looplm.cli import main
from looplm.config import LoopedConfig
from looplm.errors import InputError
from looplm.families.known import family_of
from looplm.model import LoopedTransformer

OURO = replace(
    LoopedConfig.ouro_1_4b(),
    vocab_size=13,
    max_positions=16,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    ffn_width=12,
    num_core_layers=2,
)
HUGINN = replace(
    LoopedConfig.huginn_3_5b(),
    vocab_size=13,
    max_positions=16,
    width=8,
    num_heads=2,
    ffn_width=12,
    num_prelude_layers=1,
    num_core_layers=2,
    num_coda_layers=1,
    embedding_scale=8**0.5,
)
NATIVE = LoopedConfig(vocab_size=13, max_positions=16, width=8, num_heads=2, ffn_width=12, input_injection="diagonal")
KINDS = {
    "ouro": OURO,
    "ouro_tied": replace(OURO, tie_embeddings=True, num_kv_heads=None, attention_head_width=6),
    "huginn": HUGINN,
    "huginn_untied": replace(HUGINN, tie_embeddings=False, qk_bias=False, state_init="zeros", num_coda_layers=0),
    "native": NATIVE,
}
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = LoopedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def ouro(tmp_path):
    folder = tmp_path / "ouro"
    save_pretrained(random_model(OURO), folder, num_loops=4)
    return folder


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_model_comes_back_bit_for_bit(kind, dtype, tmp_path):
    model = random_model(KINDS[kind]).to(dtype)
    save_pretrained(model, tmp_path / "a", num_loops=4)
    again = from_pretrained(tmp_path / "a")
    assert same_weights(model, again)
    assert replace(again.config, dropout=0.1, init_std=0.02) == replace(
        model.config,
        dropout=0.1,
        init_std=0.02,
        num_kv_heads=again.config.num_kv_heads,
    )
    assert torch.equal(again(TOKENS, num_loops=3), model(TOKENS, num_loops=3))
    save_pretrained(again, tmp_path / "b")
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()
    }


def test_families_are_told_by_the_architecture_alone():
    assert [getattr(family_of(c), "model_type", None) for c in (OURO, HUGINN, NATIVE)] == ["ouro", "huginn_raven", None]
    assert family_of(replace(OURO, dropout=0.1, init_std=0.5)).model_type == "ouro"
    for changes in ({"norm_placement": "sandwich_dual"}, {"exit_gate": False}, {"num_prelude_layers": 1}):
        assert family_of(replace(OURO, **changes)) is None


def test_large_weights_go_into_shards_with_an_index(tmp_path):
    model = random_model(OURO)
    save_pretrained(model, tmp_path / "one", num_loops=4)
    save_pretrained(model, tmp_path / "many", num_loops=4, max_shard_bytes=1500)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    parts = {name: tensor for file in files for name, tensor in load_file(tmp_path / "many" / file).items()}
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert same_weights(from_pretrained(tmp_path / "many"), model)


def test_weights_are_converted_to_the_type_that_is_asked_for(ouro):
    model = from_pretrained(ouro, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.head.weight, from_pretrained(ouro).head.weight.bfloat16())


def test_config_fields_tokenizer_and_code_are_given_back_as_they_were(ouro, tmp_path):
    fields = {**json.loads((ouro / "config.json").read_text()), "auto_map": {"AutoModel": "modeling_ouro.X"}, "x": [1]}
    (ouro / "config.json").write_text(json.dumps(fields))
    (ouro / "tokenizer.json").write_text('{"a": "ü"}')
    (ouro / "modeling_ouro.py").write_text("raise SystemExit('must not run')")
    (ouro / "README.md").write_text("stays")
    assert main(["import", str(ouro), str(tmp_path / "m.ckpt")]) == 0
    assert main(["export", str(tmp_path / "m.ckpt"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == fields
    for name in ("tokenizer.json", "modeling_ouro.py", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (ouro / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_fine_tuned_model_is_exported_like_its_original(ouro, tmp_path, capsys):
    (ouro / "tokenizer.json").write_text("{}")
    model = from_pretrained(ouro)
    model.origin = None
    with torch.no_grad():
        model.core[0].ffn.up.weight.add_(1.0)
    save_checkpoint(model, tmp_path / "tuned.ckpt")
    assert main(["export", str(tmp_path / "tuned.ckpt"), str(tmp_path / "out")]) == 2
    assert "`num_loops` must be given" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "tuned.ckpt"), str(tmp_path / "out"), "--like", str(ouro)]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["total_ut_steps"] == 4
    assert same_weights(from_pretrained(tmp_path / "out"), model)
    assert main(["export", str(tmp_path / "tuned.ckpt"), str(tmp_path / "out8"), "--num_loops", "8"]) == 0
    assert json.loads((tmp_path / "out8" / "config.json").read_text())["total_ut_steps"] == 8


def test_a_trained_run_is_exported_imported_and_tested(write_config, tmp_path, capsys):
    config = str(write_config(trainer__default_root_dir=str(tmp_path / "run")))
    assert main(["fit", "--config", config]) == 0
    trained = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(trained), str(tmp_path / "hf")]) == 0
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["model_type"] == "looplm"
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "again.ckpt")]) == 0
    assert same_weights(load_checkpoint(trained), load_checkpoint(tmp_path / "again.ckpt"))
    curve = tmp_path / "run" / "test_curve.csv"
    assert main(["test", "--config", config]) == 0
    first = curve.read_bytes()
    curve.unlink()
    assert main(["test", "--config", config, "--ckpt_path", str(tmp_path / "again.ckpt")]) == 0
    assert curve.read_bytes() == first


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_fields(**values):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **values}))

    return change


def set_field(name, value):
    return set_fields(**{name: value})


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def swap_for_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


BROKEN = {
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")),
        r"lacks the tensors \['model.norm.weight'\]",
    ),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(x=torch.zeros(2))), r"superfluous tensors \['x'\]"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.zeros(9)})),
        r"'model.norm.weight' must have the shape \(8,\), got \(9,\)",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.zeros(8, dtype=torch.int8)})),
        "'model.norm.weight' must be of .* got I8",
    ),
    "truncated": (truncate, "is damaged, or no safetensors file"),
    "header of nonsense": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "is damaged, or no safetensors file",
    ),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged, or no safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks the weights model.safetensors"),
    "pickle": (swap_for_pickle, r"holds pickle files.*\['pytorch_model.bin'\]"),
    "pickle by another name": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"),
        "is damaged, or no safetensors file",
    ),
    "pickle beside": (lambda f: (f / "training_args.bin").write_bytes(b"x"), "holds pickle files"),
    "unknown type": (set_field("model_type", "llama"), r"`model_type` must be one of .*'ouro'.*got 'llama'"),
    "no type": (set_field("model_type", None), "`model_type` must be one of .* got None"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no readable config.json"),
    "config of nonsense": (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold an object, got list"),
    "a field of text": (set_field("hidden_size", "8"), "`hidden_size` must be an integer, got '8'"),
    "a missing field": (set_field("total_ut_steps", None), "`total_ut_steps` must be an integer, got None"),
    "other activation": (set_field("hidden_act", "gelu"), "`hidden_act` must be one of .* got 'gelu'"),
    "scaled rotary": (set_field("rope_scaling", {"rope_type": "yarn"}), "only the default rotary positions"),
    "window": (set_field("use_sliding_window", True), "`use_sliding_window` must be one of"),
    "heads do not divide": (set_field("num_key_value_heads", 3), "`num_kv_heads` must divide"),
    "other sizes": (set_fields(num_hidden_layers=3, layer_types=None), "lacks the tensors .*layers.2.*and 6 more"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_directory_is_refused_in_one_line(name, ouro, tmp_path, capsys):
    change, message = BROKEN[name]
    change(ouro)
    with pytest.raises(InputError, match=message):
        from_pretrained(ouro)
    assert main(["import", str(ouro), str(tmp_path / "out.ckpt")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "out.ckpt").exists()


def test_a_bad_index_is_refused(tmp_path):
    save_pretrained(random_model(OURO), tmp_path / "good", num_loops=4, max_shard_bytes=1500)
    index = json.loads((tmp_path / "good" / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])

    def broken(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        weight_map = dict(index["weight_map"])
        change(weight_map)
        (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path / "bad"

    for change, message in (
        (lambda m: m.update({names[0]: m[names[-1]]}), "which does not hold it"),
        (lambda m: m.pop(names[0]), "does not name the tensors"),
        (lambda m: m.update({names[0]: "../good/" + m[names[0]]}), "files of the same directory"),
        (lambda m: m.update({names[0]: "absent.safetensors"}), "lacks the weights absent.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            from_pretrained(broken(change))


def test_a_rotary_table_that_contradicts_the_config_is_refused(tmp_path):
    save_pretrained(random_model(HUGINN), tmp_path / "a", num_loops=4)
    set_field("rope_base", 10_000.0)(tmp_path / "a")
    with pytest.raises(InputError, match="'freqs_cis' is not the table of `rope_base` 10000"):
        from_pretrained(tmp_path / "a")


def test_places_that_cannot_be_read_or_written_are_refused(ouro, tmp_path, capsys):
    with pytest.raises(InputError, match="must be a directory or a hub id"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="must be a new or empty directory"):
        save_pretrained(from_pretrained(ouro), ouro)
    (tmp_path / "file").write_text("x")
    for arguments in (
        ["export", str(tmp_path / "none.ckpt"), str(tmp_path / "o")],
        ["export", str(tmp_path / "file"), str(tmp_path / "o")],
        ["import", str(ouro), str(tmp_path / "file" / "m.ckpt")],
        ["export", str(tmp_path / "file"), str(tmp_path / "o"), "--num_loops", "0"],
        ["export", str(tmp_path / "file"), str(tmp_path / "o"), "--like", str(tmp_path / "none")],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_no_more_memory_than_the_weights(dtype, tmp_path):
    config = replace(OURO, vocab_size=16000, width=1024, num_heads=8, num_kv_heads=None, ffn_width=4096)
    model = LoopedTransformer(replace(config, num_core_layers=6)).to(getattr(torch, dtype))
    save_pretrained(model, tmp_path / "m", num_loops=2)
    save_pretrained(LoopedTransformer(OURO), tmp_path / "small", num_loops=2)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # Not getrusage: its peak counts what the parent had before this program was started. A small model first: torch
    # loads a good part of itself when it is needed.
    code = (
        "import sys, torch, looplm.checkpoints\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "looplm.checkpoints.from_pretrained(sys.argv[1] + '/small')\n"
        "before = peak(); m = looplm.checkpoints.from_pretrained(sys.argv[1] + '/m'); print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights > 1e8
    assert 0.9 * weights <= int(done.stdout) <= 1.1 * weights
