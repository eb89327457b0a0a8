"""The path of a forward stays short, and the walk that shows it sees what runs."""

from walk import Walk, walk


def test_a_local_forward_is_short():
    walked = walk("local")
    files, functions, moves, _ = walked.figures
    assert files <= 18
    assert functions <= 74
    assert moves <= 65
    names = [code.co_qualname for _, code in walked.calls]
    assert names[0] == "MoE.forward"
    assert {"TopKGate.forward", "Plan.of", "LocalDispatcher.__call__", "FeedForwardExperts.forward"} <= set(names)


def test_nothing_of_ours_is_an_empty_walk():
    with Walk() as walked:
        sorted([2, 1])
    assert walked.figures == (0, 0, 0, 0)
