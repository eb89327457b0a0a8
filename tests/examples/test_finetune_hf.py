"""The job that trains a Hugging Face model: alike on one rank and two, and saved as transformers reads it."""

import pytest
import ranks
import torch

pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[hf]"')
import corpus
import finetune_hf


def test_two_ranks_learn_the_same_and_transformers_reads_it(tmp_path, text):
    flags = ["--steps", "3", "--batch", "8", "--seq", "16", "--out", str(tmp_path / "out")]
    job, cpu = finetune_hf.parse(flags), torch.device("cpu")
    data = corpus.read(corpus.text_files([text]), job.seq)
    [one], [two, _] = (ranks.run(number, finetune_hf.train, job, data, cpu) for number in (1, 2))
    assert one["losses"][-1] < one["losses"][0] - 0.05
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-4)
    assert two["held_out_by_transformers"] == pytest.approx(two["held_out"], rel=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_families_build_small(family):
    model = finetune_hf.build(finetune_hf.parse(["--family", family]))
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert type(model).__name__.endswith("ForCausalLM")


def test_an_unknown_family_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"--family mixtrall: no such family; .*hf_families.md lists"):
        finetune_hf.check(finetune_hf.parse(["--family", "mixtrall"]))
