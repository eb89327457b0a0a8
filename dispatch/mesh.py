"""The axes of a DeviceMesh, told by name.

"ep": the ranks that share the experts; it may be given as "node" and "local". "edp": the ranks that repeat
them. "etp": the ranks that hold slices of the same experts. Along all of these, ranks have parts of the batch
of their own.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

EP, EDP, ETP, NODE, LOCAL = "ep", "edp", "etp", "node", "local"


def names(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of a mesh's axes."""
    return mesh.mesh_dim_names or ()


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """The sub-mesh of one axis, None if there is none; "ep" is made of "node" and "local" where it is so given."""
    if name in names(mesh):
        return mesh[name]
    if name == EP and {NODE, LOCAL} <= set(names(mesh)):
        return mesh[NODE, LOCAL]._flatten(EP)
    return None


def holders(mesh: DeviceMesh) -> DeviceMesh:
    """The axes over which one copy of the experts lies: "ep", and "etp" where there is more than one slice."""
    etp = axis(mesh, ETP)
    if etp is None or etp.size() == 1:
        ep = axis(mesh, EP)
        assert ep is not None
        return ep
    return mesh[tuple(name for name in names(mesh) if name in (EP, NODE, LOCAL, ETP))]


def node_and_local(mesh: DeviceMesh) -> tuple[ProcessGroup, ProcessGroup]:
    """The groups of the axes "node" and "local", which stand in place of "ep".

    Ranks of a group are sorted, whatever their order in a mesh (torch 2.13). So a mesh must list them in
    ascending order, or a rank's place on the two axes would not tell its place on both together.
    """
    given = tuple(name for name in names(mesh) if name in (NODE, LOCAL, EP))
    if given != (NODE, LOCAL):
        raise ValueError(
            f'a hierarchical exchange needs a mesh with axes "node" and "local" in place of "ep"; got {names(mesh)}'
        )
    ranks = mesh.mesh.movedim([names(mesh).index(NODE), names(mesh).index(LOCAL)], [-2, -1]).flatten(-2)
    if bool((ranks.diff() < 0).any()):
        raise ValueError(
            f"ranks must ascend along node and local; got {mesh.mesh.tolist()}; init_device_mesh makes it so"
        )
    return mesh.get_group(NODE), mesh.get_group(LOCAL)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes along which ranks have parts of the batch."""
    axes = tuple(name for name in names(mesh) if name in (EDP, EP, NODE, LOCAL, ETP))
    if not axes:
        raise ValueError(f'the mesh needs axes named "ep" (or "node" and "local") and/or "edp"; got {names(mesh)}')
    if ETP in axes and not {EP, NODE} & set(axes):
        raise ValueError(
            f'"etp" splits what "ep" spreads: give the mesh an axis "ep", too (of size 1); got {names(mesh)}'
        )
    return mesh[axes]


def data_group(mesh: DeviceMesh) -> ProcessGroup | None:
    """All ranks that have a part of the batch; None if that is this one alone."""
    data = data_mesh(mesh)
    if data.size() == 1:
        return None
    return data.get_group() if data.ndim == 1 else data._flatten("_".join(names(data))).get_group()
