"""Models of Hugging Face read by many ranks: each has what transformers reads, and has read no more than its part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
from hf_families import FAMILIES, batch, tiny
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, MixtralConfig, MixtralForCausalLM
from turnout.models.hf import loading, replace_moe, save_pretrained, weight_files
from turnout.models.hf.loading import empty_pretrained, from_pretrained, load_pretrained
from turnout.models.hf.slots import family_slots
from turnout.models.hf.weight_files import WeightReader, WeightWriter
from turnout.moe import fully_shard_experts, parallelize

PAGES = 28 << 20  # of files and libraries, which the kernel may take back


def auto(family: str):
    return AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        tiny(family).save_pretrained(folder / family, max_shard_size="20KB" if family in ("dbrx", "olmoe") else "5GB")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_has_what_transformers_has(folders, family):
    model = from_pretrained(folders / family, auto_class=auto(family))
    expected = auto(family).from_pretrained(folders / family)
    assert not model.training
    assert torch.equal(model(**batch(family)).logits, expected(**batch(family)).logits)
    state = expected.state_dict()
    for name, slot in family_slots(model).items():
        assert slot.tensor.dtype == state[name].dtype
        assert torch.equal(slot.of_file(slot.tensor), state[name]), name


def test_a_model_whose_blocks_stay_is_read_as_well(folders):
    model = load_pretrained(empty_pretrained(folders / "mixtral"), folders / "mixtral").eval()
    expected = AutoModelForCausalLM.from_pretrained(folders / "mixtral")
    assert torch.equal(model(**batch("mixtral")).logits, expected(**batch("mixtral")).logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_half_precision_but_for_what_the_family_keeps_exact(folders, family):
    model = from_pretrained(folders / family, dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(folders / family, dtype=torch.bfloat16).state_dict()
    for name, slot in family_slots(model).items():
        assert slot.tensor.dtype == expected[name].dtype, name
        assert torch.equal(slot.of_file(slot.tensor), expected[name]), name
    assert torch.bfloat16 in {t.dtype for t in expected.values()}


SPREAD = [  # family, mesh, and whether FSDP2 shards all of it
    ("mixtral", {"edp": 2, "ep": 2}, True),
    ("olmoe", {"ep": 2, "edp": 2}, False),
    ("gpt_oss", {"ep": 4}, False),
    ("dbrx", {"node": 2, "local": 2}, False),
    ("switch_transformers", {"edp": 2, "ep": 2}, True),
]


class Counted(WeightReader):
    made: list[Counted] = []  # noqa: RUF012

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.made.append(self)


def part_of(tensor: torch.Tensor) -> int:
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


def spread(folder: Path) -> list[str]:
    """Load each case, say what differs from transformers' own, save it again and train on."""
    loading.WeightReader, wrong = Counted, []
    for family, sizes, sharded in SPREAD:
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if sharded:
            model = parallelize(replace_moe(empty_pretrained(folder / family, auto(family))), mesh, dispatcher="flat")
            fully_shard_experts(model, mesh)
            fully_shard(model, mesh=mesh._flatten())
            load_pretrained(model, folder / family).eval()
        else:
            model = from_pretrained(folder / family, mesh, auto_class=auto(family), dispatcher="flat")
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        share = sum(part_of(t) for t in {id(s.tensor): s.tensor for s in family_slots(model).values()}.values())
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        read = Counted.made[-1].bytes_read
        # of gate and up, which the file has apart, a rank reads the whole of its experts: FSDP2 splits their sum
        right = share < read < whole if family == "mixtral" else read == share
        if not right:
            wrong.append(f"{family}: read {read} bytes for a share of {share}")
        expected = auto(family).from_pretrained(folder / family)
        state = expected.state_dict()
        for name, slot in family_slots(model).items():
            tensor = slot.tensor.full_tensor() if isinstance(slot.tensor, DTensor) else slot.tensor
            if not torch.equal(slot.of_file(tensor), state[name]):
                wrong.append(f"{family}: {name}")
        if not torch.allclose(model(**batch(family)).logits, expected(**batch(family)).logits, atol=1e-4):
            wrong.append(f"{family}: logits")
        save_pretrained(model, folder / "saved" / family, max_shard_size="30KB")
    return wrong


def test_ranks_have_what_transformers_has_and_have_read_their_part(folders):
    assert ranks.run(4, spread, folders) == [[]] * 4
    for family, _, _ in SPREAD:
        saved = auto(family).from_pretrained(folders / "saved" / family)
        expected = auto(family).from_pretrained(folders / family)
        for (name, ours), theirs in zip(saved.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
        files = [path.stat().st_size for path in (folders / "saved" / family).glob("*.safetensors")]
        assert len(files) > 1
        assert sum(size > 40_000 for size in files) <= 2  # one tensor may be larger than a file should be


def peak() -> dict[str, int]:
    """Bytes of main memory of this process: now, and at most since it began."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rest[0]) << 10 for name, *rest in lines if name in ("VmRSS:", "VmHWM:")}


def grown(folder: Path, small: Path) -> tuple[int, int]:
    """By how much loading makes a rank grow, and its part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    weight_files.MAPPED = 8 << 20
    from_pretrained(small, mesh)  # pages of the libraries count as memory when they are first used
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = peak()["VmRSS:"]
    model = from_pretrained(folder, mesh)
    return peak()["VmHWM:"] - before, sum(map(part_of, model.parameters()))


def test_the_memory_of_a_rank_is_its_part_and_a_tensor(tmp_path, folders):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_local_experts": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
    with torch.random.fork_rng():
        model = replace_moe(MixtralForCausalLM(MixtralConfig(**sizes, **heads)))
    save_pretrained(model, tmp_path, max_shard_size="10MB")
    whole = sum(map(part_of, model.parameters()))
    expert = 3 * 1024 * 512 * 4
    for growth, part in ranks.run(4, grown, tmp_path, folders / "mixtral"):
        assert part + 2 * expert + PAGES < 0.7 * whole
        assert growth < part + 2 * expert + PAGES


def without(folder: Path, to: Path, change) -> Path:
    """A copy of a folder, its tensors or config changed."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
GAP = EXPERT.replace("experts.2", "experts.9")
FAULTS = {
    "it has no model.norm.weight": lambda tensors, config: tensors.pop("model.norm.weight"),
    "3 tensors .experts": lambda tensors, config: tensors.pop(EXPERT),
    "of experts .0, 1, 3, 9.": lambda tensors, config: tensors.update({GAP: tensors.pop(EXPERT)}),
    "the model has no surplus": lambda tensors, config: tensors.update(surplus=torch.ones(1)),
    "and \\(16,\\) in the model": lambda tensors, config: tensors.update({"model.norm.weight": torch.ones(15)}),
    "tie_word_embeddings to false": lambda tensors, config: config.update(tie_word_embeddings=True),
    "quantised": lambda tensors, config: config.update(quantization_config={"quant_method": "fp8"}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_fit_is_named(folders, tmp_path, message):
    folder = without(folders / "mixtral", tmp_path / "changed", FAULTS[message])
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_a_folder_without_files_is_named(tmp_path, folders):
    with pytest.raises(ValueError, match=r"config\.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folders / "mixtral" / "config.json").read_text())
    with pytest.raises(ValueError, match="snapshot_download"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="torn"):
        from_pretrained(tmp_path)
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig.from_pretrained(folders / "mixtral"))
    with pytest.raises(ValueError, match="empty_pretrained"):
        load_pretrained(model, folders / "mixtral")


def load_on_ranks(folder: Path) -> None:
    from_pretrained(folder, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))


def test_a_fault_that_one_rank_sees_is_raised_on_all(folders, tmp_path):
    folder = without(
        folders / "mixtral", tmp_path / "changed", lambda tensors, _: tensors.update({EXPERT: torch.ones(3, 16)})
    )
    for error in ranks.errors(2, load_on_ranks, folder):  # expert 2 is read by the second rank alone
        assert error.startswith("CheckpointError: rank 1")


def save_to_a_full_disk(folder: Path, to: Path) -> None:
    model = from_pretrained(folder, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    write = WeightWriter.write

    def full(writer, name, tensor) -> None:
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        write(writer, name, tensor)

    WeightWriter.write = full
    save_pretrained(model, to)


def test_a_disk_that_is_full_is_told_on_every_rank_and_leaves_no_half_file(folders, tmp_path):
    for error in ranks.errors(2, save_to_a_full_disk, folders / "mixtral", tmp_path):
        assert error.startswith("CheckpointError: rank 0")
        assert "No space left" in error
    assert not list(tmp_path.glob("*.safetensors*"))
