"""Backend `cpu`: placeholder while the compiled kernel is being written."""


def load_error():
    return "not built"
