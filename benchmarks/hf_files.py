"""How much main memory ranks need to load and save a model of Hugging Face: ours, and transformers' own way.

    python benchmarks/hf_files.py --experts 8 --hidden 2048 --ffn 5120 --layers 6 --ranks 4

Each way runs in processes of its own, started anew: peak resident memory (VmHWM) above what the process had before.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from pathlib import Path
from typing import Any

MB = 1 << 20


def write(folder: Path, args: argparse.Namespace) -> int:
    """A Mixtral of random numbers, tensor by tensor; its bytes."""
    import torch
    from transformers import MixtralConfig
    from turnout.models import GPT, GPTConfig
    from turnout.models.hf.gpt_format import to_hf

    config = GPTConfig(
        vocab=1024,
        dim=args.hidden,
        layers=args.layers,
        heads=args.hidden // 128,
        hidden=args.ffn,
        num_experts=args.experts,
        moe_every=1,
        tied=False,
    )
    torch.manual_seed(0)
    to_hf(GPT(config).to(torch.bfloat16), folder, max_shard_size="1GB")
    assert MixtralConfig.from_pretrained(folder).num_local_experts == args.experts
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def resident() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {name.rstrip(":"): int(rest[0]) * 1024 for name, *rest in lines if name in ("VmRSS:", "VmHWM:")}


def measured(work: Any) -> tuple[Any, int, float]:
    """What `work` returns, by how many bytes the peak lies above what was there before, and seconds."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident()["VmRSS"], time.perf_counter()
    made = work()
    return made, resident()["VmHWM"] - before, time.perf_counter() - start


def work(rank: int, way: str, ranks: int, folder: Path, store: str, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM
    from turnout.models.hf import replace_moe, restored, save_pretrained
    from turnout.models.hf.loading import from_pretrained
    from turnout.moe import parallelize

    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))

    def ours() -> Any:
        return from_pretrained(folder, mesh, dispatcher="flat")

    def theirs() -> Any:
        return parallelize(replace_moe(AutoModelForCausalLM.from_pretrained(folder)), mesh, dispatcher="flat")

    def whole() -> None:
        with restored(model) as own:
            if rank == 0:
                own.save_pretrained(Path(store).parent / way)
        dist.barrier()

    def by_tensor() -> None:
        save_pretrained(model, Path(store).parent / way, max_shard_size="1GB")

    model, load, load_s = measured(theirs if way == "transformers" else ours)
    part = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
    _, save, save_s = measured(whole if way == "transformers" else by_tensor)
    results.put((rank, part, load, load_s, save, save_s))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"experts": 8, "hidden": 2048, "ffn": 5120, "layers": 6, "ranks": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, context = parser.parse_args(), mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Pool(1)
        size = writer.apply(write, (Path(folder) / "model", args))
        writer.close()
        expert = 3 * args.hidden * args.ffn * 2
        print(f"model {size / MB:,.0f} MB, experts of a layer {args.experts * expert / MB:,.0f} MB, {args.ranks} ranks")
        for way in ("ours", "transformers"):
            results = context.Queue()
            given = (way, args.ranks, Path(folder) / "model", f"{folder}/store-{way}", results)
            started = [context.Process(target=work, args=(rank, *given)) for rank in range(args.ranks)]
            for process in started:
                process.start()
            found = sorted(results.get() for _ in started)
            for process in started:
                process.join()
            for rank, part, load, load_s, save, save_s in found:
                print(
                    f"{way:13} rank {rank}: part {part / MB:6,.0f} MB; load {load / MB:6,.0f} MB in {load_s:5.1f} s; "
                    f"save {save / MB:6,.0f} MB in {save_s:5.1f} s"
                )


if __name__ == "__main__":
    main()
