import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20 + str(i))
    return str(folder)
