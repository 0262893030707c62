"""save and load: what comes back is what was written, and any damage to the files is seen and named."""

import errno
import json
import logging
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import gossamer
from gossamer.attach.targets import find
from gossamer.attach.weights import Masked
from gossamer.core import Density, select
from gossamer.core.errors import FileDamaged, GossamerError, TargetError
from gossamer.deploy import read_record, report_of
from gossamer.deploy.examples import call, tensors
from gossamer.deploy.fuse import FusedActivation
from gossamer.deploy.save import seal_of
from gossamer.deploy.tensors import disk_bytes
from gossamer.nn.linear import PackedLinear


def prune(model, density=0.25, pattern="4-row"):
    for target in find(model).targets:
        w = target.weight(model).detach()
        kept = select(w.abs(), pattern, Density(density)).kept
        target.write(model, torch.where(kept, w, torch.zeros((), dtype=w.dtype)))
    return model.eval()


class Net(nn.Module):
    """Every kind of tensor a model may hold: tied weights, buffers of both kinds, a plain attribute, an odd shape."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.a, self.act, self.b = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.arange(3))
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)
        self.shift = torch.ones(32)
        self.frozen = nn.Parameter(torch.zeros(0, 4), requires_grad=False)

    def forward(self, ids):
        return self.head(self.b(self.act(self.a(self.embed(ids) + self.shift))) * self.scale)


@pytest.fixture
def ids():
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def packed(ids):
    torch.manual_seed(0)
    net = Net().eval()
    for layer in (net.a, net.b):
        w = layer.weight.data
        w.mul_(select(w.abs(), "4-row", Density(0.25)).kept)
    return gossamer.pack(net, ids, candidates=["rowgrouped/cpu"], repeats=1)


@pytest.fixture
def folder(packed, tmp_path):
    return gossamer.save(packed, tmp_path / "saved")


def outputs(model, example):
    return list(tensors(call(model, example)))


def same(a, b, example):
    return all(torch.equal(x, y) for x, y in zip(outputs(a, example), outputs(b, example), strict=True))


def test_own_classes_come_back_with_all_their_tensors(packed, folder, ids):
    loaded = gossamer.load(folder, model=Net())
    assert same(loaded, packed, ids)
    assert loaded.head.weight is loaded.embed.weight
    assert type(loaded.act) is FusedActivation and isinstance(loaded.a, PackedLinear) and loaded.a.activation == "gelu"
    assert torch.equal(loaded.shift, packed.shift) and torch.equal(loaded.scale, packed.scale)
    assert loaded.frozen.requires_grad is False and not loaded.training
    assert "scale" in loaded._non_persistent_buffers_set
    assert report_of(loaded) == report_of(packed)
    assert torch.equal(gossamer.unpack(loaded).a.weight, gossamer.unpack(packed).a.weight)


def test_the_class_must_be_brought_and_must_fit(folder):
    with pytest.raises(TargetError, match="model=Net"):
        gossamer.load(folder)
    with pytest.raises(TargetError, match="no module"):
        gossamer.load(folder, model=nn.Sequential(nn.Linear(2, 2)))
    wider = Net()
    wider.a = nn.Linear(32, 65)
    with pytest.raises(TargetError, match=r"layer 'a'.*65"):
        gossamer.load(folder, model=wider)
    longer = Net()
    longer.register_buffer("more", torch.ones(1))
    with pytest.raises(TargetError, match="more"):
        gossamer.load(folder, model=longer)


def transformers_model(kind):
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "bert":
        return t.BertModel(t.BertConfig(**small, vocab_size=50)).eval()
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**small, vocab_size=50, tie_word_embeddings=kind == "tied")).eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "tied", "untied"])
def test_transformers_models_need_no_code(kind, tmp_path):
    model, example = prune(transformers_model(kind)), {"input_ids": torch.arange(10).view(1, 10)}
    packed = gossamer.pack(model, example, candidates=["rowgrouped/cpu"], repeats=1)
    loaded = gossamer.load(gossamer.save(packed, tmp_path / "m"))
    assert type(loaded) is type(model) and same(loaded, packed, example)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in packed.modules()]
    mine, theirs = gossamer.unpack(loaded).state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    if kind == "tied":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(**example, **options), model.generate(**example, **options))


def test_vision_models_need_no_code(tmp_path):
    from gossamer.data.vision import MobileNetV2

    torch.manual_seed(0)
    model, x = prune(MobileNetV2(classes=12), pattern="unstructured"), torch.randn(1, 3, 64, 64)
    packed = gossamer.pack(model, x, candidates=["csr"], repeats=1)
    loaded = gossamer.load(gossamer.save(packed, tmp_path / "m"))
    assert same(loaded, packed, x) and loaded.classifier[1].out_features == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_model_is_stored_without_its_zeros_and_comes_back_dense(tmp_path, dtype):
    model = prune(transformers_model("tied"), 0.5, "unstructured").to(dtype)
    path = gossamer.save(model, tmp_path / "m")
    loaded = gossamer.load(path)
    mine, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert not any(isinstance(m, PackedLinear) for m in loaded.modules())
    size, dense = (path / "model.safetensors").stat().st_size, sum(p.numel() for p in model.parameters())
    assert disk_bytes(model) < 0.75 * dense * dtype.itemsize and size - disk_bytes(model) < 20_000


def test_bytes_on_disk_are_as_reported(packed, folder):
    size = (folder / "model.safetensors").stat().st_size
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert size - 8 - header == disk_bytes(packed) == report_of(packed).bytes_on_disk


def test_every_flipped_bit_is_seen_and_named(folder):
    file = folder / "model.safetensors"
    good = file.read_bytes()
    header = int.from_bytes(good[:8], "little")
    spans = {k: v["data_offsets"] for k, v in json.loads(good[8 : 8 + header]).items() if k != "__metadata__"}
    for name, (begin, end) in spans.items():
        if begin == end:
            continue
        bad = bytearray(good)
        bad[8 + header + (begin + end) // 2] ^= 4
        file.write_bytes(bad)
        with pytest.raises(FileDamaged, match=f"tensor '{name}' was altered"):
            gossamer.load(folder, model=Net())
    for at in (3, 20, 8 + header - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        file.write_bytes(bad)
        with pytest.raises(FileDamaged, match="header"):
            gossamer.load(folder, model=Net())


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files_are_refused(folder, keep):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(FileDamaged, match="bytes instead of"):
        gossamer.load(folder, model=Net())
    with pytest.raises(FileDamaged):
        gossamer.load(folder, model=Net(), verify=False)


def test_a_cut_names_the_tensor(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileDamaged, match="cut off in or before tensor '"):
        gossamer.load(folder, model=Net())


def reseal(folder, change):
    file = folder / "gossamer.json"
    record = json.loads(file.read_text())
    change(record)
    record["sha256"] = seal_of(record)
    file.write_text(json.dumps(record))


def test_record_damage_is_seen(folder):
    file = folder / "gossamer.json"
    text = file.read_text()
    file.write_text(text.replace('"gelu"', '"relu"', 1))
    with pytest.raises(FileDamaged, match="altered"):
        gossamer.load(folder, model=Net())
    file.write_text(text[: len(text) // 2])
    with pytest.raises(FileDamaged, match="cannot be read"):
        gossamer.load(folder, model=Net())
    file.unlink()
    with pytest.raises(FileDamaged, match=r"no gossamer\.json"):
        gossamer.load(folder, model=Net())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["tensors"]["a.values"].update(kept=1), "'a.values' keeps"),
        (lambda r: r["layers"]["a"].update(kept=1), "layer 'a' keeps"),
        (lambda r: r["stored"]["b.values"].update(dtype="float16"), "'b.values' is float32"),
        (lambda r: r["stored"]["b.values"].update(shape=[1]), "'b.values' is float32"),
        (lambda r: r["layers"]["a"]["meta"].update(cols=31), "'a'"),
        (lambda r: r["stored"].pop("b.values"), "disagree on tensor 'b.values'"),
        (lambda r: r.update(format=99), "format 99"),
    ],
)
def test_a_record_that_disagrees_with_its_file_is_refused(folder, change, words):
    reseal(folder, change)
    with pytest.raises(FileDamaged, match=words):
        gossamer.load(folder, model=Net(), verify=False)


def test_no_class_is_imported_from_a_record(folder):
    for skeleton in (
        {"kind": "transformers", "class": "os", "config_class": "BertConfig", "config": {}},
        {"kind": "transformers", "class": "AutoModel", "config_class": "BertConfig", "config": {}},
        {"kind": "gossamer.data.vision", "class": "__builtins__", "classes": 3},
    ):
        reseal(folder, lambda r, s=skeleton: r.update(skeleton=s))
        with pytest.raises(FileDamaged, match="the record names"):
            gossamer.load(folder)


def test_a_full_disk_leaves_nothing_behind(packed, tmp_path, monkeypatch):

    module = sys.modules["gossamer.deploy.save"]

    def full(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(GossamerError, match="No space left"):
        gossamer.save(packed, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_earlier_one(packed, folder, ids, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["gossamer.deploy.save"], "save_file", full)
    with pytest.raises(GossamerError):
        gossamer.save(packed, folder)
    assert same(gossamer.load(folder, model=Net()), packed, ids)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_with_other_files_is_not_replaced(packed, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GossamerError, match="would be replaced"):
        gossamer.save(packed, tmp_path)
    with pytest.raises(GossamerError, match="is a file"):
        gossamer.save(packed, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_masks_must_be_removed_first(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8))
    parametrize.register_parametrization(net[0], "weight", Masked(torch.ones(8, 8, dtype=torch.bool)))
    with pytest.raises(TargetError, match=r"handle\.remove\(\)"):
        gossamer.save(net, tmp_path / "m")
    with pytest.raises(TargetError, match="meta"):
        gossamer.save(nn.Linear(3, 3, device="meta"), tmp_path / "m")


def test_a_backend_this_machine_lacks_gives_way_and_says_so(packed, folder, ids, monkeypatch, caplog):
    from gossamer.kernels import sparse

    monkeypatch.setattr(sparse.Spmm, "refuse", staticmethod(lambda call: "this processor is too old"))
    with caplog.at_level(logging.WARNING, logger="gossamer"):
        loaded = gossamer.load(folder, model=Net())
    assert "too old" in caplog.text and loaded.a.plan.backend != "cpu"
    assert torch.allclose(outputs(loaded, ids)[0], outputs(packed, ids)[0], atol=1e-5)


def test_tokenizer_is_saved_beside(packed, tmp_path):
    class Words:
        def save_pretrained(self, folder):
            from pathlib import Path

            (Path(folder) / "words.json").write_text("{}")

    path = gossamer.save(packed, tmp_path / "m", tokenizer=Words())
    assert (path / "words.json").exists() and read_record(path)["layers"].keys() == {"a", "b"}


def test_nothing_is_pickled(folder):
    assert {p.name for p in folder.iterdir()} == {"gossamer.json", "model.safetensors"}
    assert b"pickle" not in (folder / "model.safetensors").read_bytes()
