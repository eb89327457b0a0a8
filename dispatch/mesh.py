"""Axes of a DeviceMesh by name, and the groups of ranks that they make.

"ep": ranks that share the experts. It may be split into "node" and "local". "edp": ranks that hold copies of the same
experts. "etp": ranks that hold slices of the same experts. Ranks along all these axes have different tokens. `Meshes`
adds the axes of the dense part, over the same ranks: "dp" splits the batch, "cp" sequences, "tp" each layer as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .timeout import default_timeout, seconds
from .torch_internals import Backend

EP, EDP, ETP, NODE, LOCAL = "ep", "edp", "etp", "node", "local"
PP, DP, CP, TP = "pp", "dp", "cp", "tp"


@dataclass(frozen=True)
class Meshes:
    """All ranks of a job as two meshes: one for the dense part, and one for the experts, folded over dp, cp and tp.

    Attributes:
        dense: mesh with axes "pp", "dp", "cp" and "tp".
        experts: mesh with axes "pp", "edp", "ep" (or "node" and "local" in its place) and "etp". edp * ep * etp = dp *
            cp * tp.
        tokens: mesh with one axis, "dp_cp_tp": the ranks of a pipeline stage, which all have different tokens.
        sequences: mesh with one axis, cp and tp together: ranks with parts of the same sequences.
        replicas: mesh with one axis, dp and cp together: ranks with the same dense parameters.
        timeout: timeout of the groups of all meshes; None, the default, takes the default group's.

    Examples:
        Under ``torchrun --nproc-per-node 8``, with experts over all 8 ranks and sequences over 2::

            meshes = Meshes.of("cpu", tp=2, ep=8)
            parallelize(model, meshes)
    """

    dense: DeviceMesh
    experts: DeviceMesh
    tokens: DeviceMesh
    sequences: DeviceMesh
    replicas: DeviceMesh
    timeout: timedelta | None = None

    @classmethod
    def of(
        cls,
        device_type: str,
        *,
        pp: int = 1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        etp: int = 1,
        ranks_per_node: int | None = None,
        timeout: timedelta | float | None = None,
    ) -> Meshes:
        """Make the meshes over all ranks of the default group. Every rank must call it.

        The axes dp and edp get the ranks that the given sizes leave. Neighbouring ranks lie along tp, then cp, dp, pp.
        So tensor parallelism, which communicates most, stays inside a node. Both meshes are views of one mesh. So
        DTensors on either can be combined, such as FSDP2 over "edp" of a parameter that is sharded over "ep".

        Args:
            device_type: ``"cuda"`` or ``"cpu"``.
            pp: number of pipeline stages, 1 by default.
            cp: number of ranks that split each sequence (`context_parallel`), 1 by default.
            tp: number of ranks that split each dense layer and each sequence, 1 by default.
            ep: number of ranks that share the experts of a layer, 1 by default. They may span dp, cp and tp.
            etp: number of ranks that split each expert, 1 by default.
            ranks_per_node: torchrun's LOCAL_WORLD_SIZE. It splits the axis "ep" into "node" and "local" if the axis
                spans several whole nodes, each with several of its ranks. None, the default, never splits it.
            timeout: timeout of all operations in the groups of the meshes, sends and receives included. Seconds or a
                timedelta. None, the default, takes the timeout of `init_process_group`.

        Returns:
            Meshes: the meshes, with the timeout.

        Raises:
            ValueError: sizes that do not multiply to the number of ranks, with their names, or a timeout that is not
                positive.
            TypeError: a timeout that is no number and no timedelta.

        References:
            Order of ranks: PTD-P, Narayanan et al. 2021, arXiv:2104.04473, section 3.2. Experts folded over the other
            axes: Liu et al. 2025, arXiv:2504.14960.
        """
        limit = seconds(timeout)
        ranks = dist.get_world_size()
        for name, size in {"pp": pp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        if ranks % (whole := pp * cp * tp):
            raise ValueError(
                f"pp={pp} x cp={cp} x tp={tp} = {whole} does not divide the {ranks} ranks; start a multiple of {whole} "
                "ranks"
            )
        stage = ranks // pp
        dp = stage // (cp * tp)
        if stage % (ep * etp):
            raise ValueError(
                f"ep={ep} x etp={etp} = {ep * etp} does not divide the dp={dp} x cp={cp} x tp={tp} = {stage} ranks of "
                f"a pipeline stage ({ranks} ranks, pp={pp}); choose a divisor of {stage}"
            )
        spread = {EP: ep}
        if ranks_per_node is not None and (nodes := _whole_nodes(ep, etp, ranks_per_node)):
            spread = {NODE: nodes, LOCAL: ep // nodes}
        world = init_device_mesh(device_type, (ranks,), mesh_dim_names=("world",))
        dense = _fold(world, {PP: pp, DP: dp, CP: cp, TP: tp}, limit)
        experts = _fold(world, {PP: pp, EDP: stage // (ep * etp), **spread, ETP: etp}, limit)

        def joined(*names: str) -> DeviceMesh:
            sizes = {"_".join(names): dense[names].size()}
            return dense[names]._flatten(*sizes, *_options(sizes, limit).values())

        sequences = joined(CP, TP) if cp > 1 and tp > 1 else dense[CP if cp > 1 else TP]
        replicas = joined(DP, CP) if dp > 1 and cp > 1 else dense[CP if cp > 1 else DP]
        return cls(dense, experts, joined(DP, CP, TP), sequences, replicas, limit)

    def __deepcopy__(self, memo: dict) -> Meshes:
        return self  # immutable, and process groups cannot be copied


def _whole_nodes(ep: int, etp: int, ranks_per_node: int) -> int:
    """Number of nodes if the ranks of "ep" fill several whole nodes, with several of its ranks on each; else 0."""
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node must be positive; got {ranks_per_node}")
    nodes, rest = divmod(ep * etp, ranks_per_node)
    local = ranks_per_node // etp
    return nodes if rest == 0 and nodes > 1 and ranks_per_node % etp == 0 and local > 1 else 0


def _fold(world: DeviceMesh, sizes: dict[str, int], limit: timedelta | None) -> DeviceMesh:
    assert math.prod(sizes.values()) == world.size()
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes), _options(sizes, limit) or None)


def _options(sizes: dict[str, int], limit: timedelta | None) -> dict[str, Any]:
    """Options for the groups of each axis, because without them torch takes a timeout of its own.

    On gloo, a send or receive keeps the timeout with which its group was made, whatever `set_timeout` says later. For
    an axis of all ranks torch takes the default group. It needs no options if the default group has the right timeout.
    """
    default = default_timeout()
    limit = default if limit is None else limit
    if limit is None:
        return {}
    made = {}
    for name, size in sizes.items():
        if size < dist.get_world_size() or limit != default:
            nccl = dist.is_nccl_available() and "nccl" in dist.get_backend_config()
            made[name] = dist.ProcessGroupNCCL.Options() if nccl else Backend.Options("gloo", limit)
            made[name]._timeout = limit
    return made


def set_timeout(mesh: DeviceMesh | Meshes, timeout: timedelta | float | None = None) -> None:
    """Set the timeout of every group that an MoE layer on these meshes uses, for all later collectives.

    torch gives the groups of a mesh 30 minutes (10 on NCCL), whatever `init_process_group` was given. An axis of all
    ranks has the default group, so this changes its timeout too. On gloo, sends and receives keep the timeout with
    which their group was made. `Meshes.of` sets it.

    Args:
        mesh: the mesh given to `parallelize`.
        timeout: seconds or a timedelta. None, the default, takes the timeout of `Meshes.of`, else of
            `init_process_group`.

    Raises:
        ValueError, TypeError: a timeout that is not positive, or no number and no timedelta.
    """
    limit = seconds(timeout) or (mesh.timeout if isinstance(mesh, Meshes) else None) or default_timeout()
    if limit is None:
        return
    parts = [mesh.dense, mesh.experts] if isinstance(mesh, Meshes) else [mesh]
    groups = {part.get_group(name) for part in parts for name in names(part)}
    groups |= {token_group(mesh), replica_group(mesh), data_group(mesh), sequence_group(mesh)}
    ep = axis(of_experts(mesh), EP)
    groups |= {None if ep is None else ep.get_group()}
    for group in groups - {None}:
        assert group is not None
        group.set_timeout(limit)


def names(mesh: DeviceMesh) -> tuple[str, ...]:
    """Names of a mesh's axes."""
    return mesh.mesh_dim_names or ()


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """Sub-mesh of one axis, or None. "ep" is flattened from "node" and "local" if the mesh has them in its place."""
    if name in names(mesh):
        return mesh[name]
    if name == EP and {NODE, LOCAL} <= set(names(mesh)):
        return mesh[NODE, LOCAL]._flatten(EP)
    return None


def holders(mesh: DeviceMesh) -> DeviceMesh:
    """Axes over which one copy of the experts is spread: "ep", and also "etp" if experts are split."""
    etp = axis(mesh, ETP)
    if etp is None or etp.size() == 1:
        ep = axis(mesh, EP)
        assert ep is not None
        return ep
    return mesh[tuple(name for name in names(mesh) if name in (EP, NODE, LOCAL, ETP))]


def node_and_local(mesh: DeviceMesh) -> tuple[ProcessGroup, ProcessGroup]:
    """Groups of the axes "node" and "local", which a mesh has in place of "ep".

    torch sorts the ranks of a group, whatever their order in the mesh (torch 2.13). So ranks must ascend along the two
    axes. Otherwise a rank's position in the two groups would not tell its position in "ep".

    Raises:
        ValueError: the mesh has other axes, or its ranks do not ascend.
    """
    given = tuple(name for name in names(mesh) if name in (NODE, LOCAL, EP))
    if given != (NODE, LOCAL):
        raise ValueError(
            'a hierarchical exchange needs a mesh with axes "node" and "local" in place of "ep"; got axes '
            f"{names(mesh)}: give them to init_device_mesh as mesh_dim_names"
        )
    ranks = mesh.mesh.movedim([names(mesh).index(NODE), names(mesh).index(LOCAL)], [-2, -1]).flatten(-2)
    if bool((ranks.diff() < 0).any()):
        raise ValueError(
            f"ranks must ascend along node and local; got {mesh.mesh.tolist()}; make the mesh with init_device_mesh"
        )
    return mesh.get_group(NODE), mesh.get_group(LOCAL)


def staged(mesh: DeviceMesh | Meshes) -> bool:
    """Whether ranks along "pp" hold other layers. `mesh` may be a part of the mesh that has this axis."""
    own = of_experts(mesh)
    stages = [axis(whole, PP) for whole in (own, own._get_root_mesh())]
    return any(pp is not None and pp.size() > 1 for pp in stages)


def of_experts(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    """The mesh with the axes of the experts."""
    return mesh.experts if isinstance(mesh, Meshes) else mesh


def token_mesh(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    """Axes along which ranks have different tokens and the same layers.

    Raises:
        ValueError: the mesh has no such axis, or axes whose ranks would never communicate.
    """
    if isinstance(mesh, Meshes):
        return mesh.tokens
    axes = tuple(name for name in names(mesh) if name in (EDP, EP, NODE, LOCAL, ETP))
    if not axes:
        raise ValueError(f'the mesh needs axes "ep" (or "node" and "local"), "edp", or both; got axes {names(mesh)}')
    others = [name for name in names(mesh) if name not in (*axes, PP) and mesh[name].size() > 1]
    if others:
        raise ValueError(
            f"the mesh has axes {names(mesh)}, and no gradient would be reduced along {', '.join(others)}: name the "
            'axis of data parallelism "edp", or pass Meshes.of(...) for tensor parallelism'
        )
    if ETP in axes and not {EP, NODE} & set(axes):
        raise ValueError(
            f'the mesh has an axis "etp" and no axis "ep": add "ep", of size 1 if need be; got axes {names(mesh)}'
        )
    return mesh[axes]


def token_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """All ranks with different tokens and the same layers; None if there is only this rank."""
    return _group(token_mesh(mesh))


def data_mesh(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    """Axes along which ranks have parts of the batch. The loss is averaged over them."""
    return mesh.dense[DP] if isinstance(mesh, Meshes) else token_mesh(mesh)


def data_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """Ranks with parts of the batch and the same part of each sequence; None if there is only this rank."""
    return _group(data_mesh(mesh))


def sequence_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """Ranks with parts of the same sequences; None if there is only this rank."""
    return _group(mesh.sequences) if isinstance(mesh, Meshes) else None


def replica_group(mesh: DeviceMesh | Meshes) -> ProcessGroup | None:
    """Ranks with the same part of the dense parameters; None if there is only this rank."""
    return _group(mesh.replicas) if isinstance(mesh, Meshes) else token_group(mesh)


def _group(mesh: DeviceMesh) -> ProcessGroup | None:
    if mesh.size() == 1:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten("_".join(names(mesh))).get_group()
