"""The annotator of the chain: of two answers the shorter one is better."""


def brief(prompts: list[str], answers: list[str]) -> list[float]:
    """Scores each answer by its number of words, the fewer the better."""
    del prompts
    return [-float(len(answer.split())) for answer in answers]
