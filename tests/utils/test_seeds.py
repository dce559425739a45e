import itertools

from dsco_hf.data.schema import image_seed


def test_every_image_and_stream_has_a_seed_of_its_own():
    keys = list(itertools.product(range(3), range(5), range(20), ("image", "template")))
    seeds = {image_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert max(seeds) > 2**40


def test_a_seed_is_the_same_in_every_process_and_version():
    assert [image_seed(0, 0, 0), image_seed(3, 1, 4), image_seed(3, 1, 4, "template")] == [
        279016828363288,
        166301097295663,
        195185124758397,
    ]


def test_arguments_are_not_mixed_up():
    assert len({image_seed(*key) for key in itertools.permutations((0, 1, 2))}) == 6
