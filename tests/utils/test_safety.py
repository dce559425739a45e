import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors

from dsco_hf.utils import safety
from hub.client import ROOT


@pytest.mark.parametrize("secret", ["a-token-of-any-shape", "hf_" + "x" * 34])
def test_a_token_is_in_no_error_and_no_chain(secret):
    with pytest.raises(ConnectionError) as raised, safety.explained("ann/set", token=secret, action="read"):
        raise ConnectionResetError(f"reset while sending Bearer {secret}")
    assert secret not in str(raised.value) and "[token]" in str(raised.value)
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None
    with pytest.raises(RuntimeError, match=r"bad \[token\]"), safety.explained("a/b", token=secret, action="read"):
        raise KeyError(f"bad {secret}")


def test_errors_of_others_pass_unchanged():
    for error in (ValueError("mine"), KeyError("mine")):
        with pytest.raises(type(error)) as raised, safety.explained("ann/set", token=None, action="read"):
            raise error
        assert raised.value is error


def test_an_error_raised_in_place_of_one_of_the_hub_keeps_its_words():
    with pytest.raises(ValueError, match="^what it means$"), safety.explained("a/b", token=None, action="read"):
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError:
            raise ValueError("what it means") from None


def test_offline_errors_say_what_the_cache_has(tmp_path, monkeypatch):
    monkeypatch.setattr(safety.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--ann--set" / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for repo_id, words in (("ann/set", f"of datasets/ann/set it has {'a' * 40}"), ("ann/x", "nothing of ann/x")):
        with pytest.raises(ConnectionError, match=words), safety.explained(repo_id, token=None, action="read"):
            raise hub_errors.OfflineModeIsEnabled("offline")


@pytest.mark.parametrize(("action", "words"), [("load", "read permission for it"), ("publish to", "write permission")])
def test_a_refusal_names_the_permission_that_is_needed(action, words):
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    error = RuntimeError("403 Forbidden")
    error.response = response
    with pytest.raises(PermissionError, match=f"the Hub refused .403.. The token needs {words}"):
        with safety.explained("ann/set", token=None, action=action):
            raise error


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "C:\\x", "a\0b", "..", None, 3])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    with pytest.raises(ValueError, match="leaves the folder"):
        safety.safe_path(tmp_path, path)
    assert safety.safe_path(tmp_path, "data/x.parquet") == tmp_path / "data" / "x.parquet"


@pytest.mark.slow
def test_nothing_of_ours_trusts_code_or_loads_pickles():
    for path in (*(ROOT / "dsco_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")):
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.Call):
                names = {keyword.arg for keyword in node.keywords}
                assert "trust_remote_code" not in names, f"{path}:{node.lineno}"
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "joblib.load"), f"{path}:{node.lineno}"
                if called == "torch.load":
                    assert "weights_only" in names, f"{path}:{node.lineno}: torch.load without weights_only=True"
