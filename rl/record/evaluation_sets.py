"""How reward workers and the evaluator agree on the name of an evaluation's rewards. Free of ray."""


def evaluation_set_name(task: str) -> str:
    """The name under which reward workers know the rewards of an evaluation task."""
    return f"evaluation:{task}"
