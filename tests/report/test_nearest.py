from sdjax.report.nearest import nearest_texts

SUM = "def merge_models(task_vectors):\n    return sum(task_vectors.values()) / 3\n"
NORM = "def merge_models(task_vectors):\n    a, b = task_vectors.values()\n    return a * b\n"


def test_the_same_program_in_another_layout_is_wholly_similar():
    source = SUM.replace("    return", "    # the mean\n    return ")
    found = nearest_texts({"x": source}, [NORM, SUM])["x"]
    assert (found.text, found.similarity) == (SUM, 1.0)


def test_a_changed_program_resembles_its_origin_most():
    changed = NORM.replace("a * b", "a + b")
    found = nearest_texts({"x": changed}, [NORM, SUM])["x"]
    assert found.text == NORM
    assert 0.5 < found.similarity < 1


def test_without_training_programs_there_is_none():
    assert nearest_texts({"x": SUM}, []) == {}
