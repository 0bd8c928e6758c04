from sdjax.report.nearest import nearest_texts

SUM = "def merge_models(task_vectors):\n    return sum(task_vectors.values()) / 3\n"
NORM = "def merge_models(task_vectors):\n    a, b = task_vectors.values()\n    return a * b\n"


def test_layout_and_comments_do_not_matter():
    source = SUM.replace("    return", "    # the mean\n    return ")
    nearest = nearest_texts({"x": source}, [NORM, SUM])["x"]
    assert (nearest.text, nearest.similarity) == (SUM, 1.0)


def test_changed_program_is_most_similar_to_its_origin():
    changed = NORM.replace("a * b", "a + b")
    nearest = nearest_texts({"x": changed}, [NORM, SUM])["x"]
    assert nearest.text == NORM
    assert 0.5 < nearest.similarity < 1


def test_no_training_programs():
    assert nearest_texts({"x": SUM}, []) == {}
