from dsco_hf.concentration.methods import METHODS, find_method, in_order


def test_methods_come_in_one_order_and_unknown_ones_last():
    assert in_order(["mine", "nopt", "random", "nopt", "herding"]) == ["random", "herding", "nopt", "mine"]
    assert find_method("nopt").label == "DsCo" and find_method("mine").label == "mine"
    assert find_method("d4m+nopt").label == "D4M + DsCo"
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
