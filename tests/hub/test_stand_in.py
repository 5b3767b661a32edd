"""The stand-in, held against huggingface_hub's real client: what the other tests here rest on."""

import hashlib
import urllib.error
import urllib.request

import pytest


def test_the_real_client_can_do_what_publishing_needs(hub, run, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nüber\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (folder / "inner" / "empty.txt").touch()
    code = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

folder, target = Path(sys.argv[1]), Path(sys.argv[2])
api = HfApi()
assert api.whoami()["name"] == "me"
assert api.create_repo("client").repo_id == "me/client"
assert api.create_repo("me/client", exist_ok=True).repo_id == "me/client"
first = api.upload_folder(repo_id="me/client", folder_path=folder, commit_message="first").oid
assert api.model_info("me/client").sha == first
files = {file.path: file for file in api.list_repo_tree("me/client", recursive=True)}
assert files["model.safetensors"].lfs.size == 1024000 and files["README.md"].lfs is None
assert files["inner"].tree_id and "inner/empty.txt" in files
assert [file.path for file in api.get_paths_info("me/client", ["README.md", "none"])] == ["README.md"]

# the same file is not sent again; a branch of its own
api.create_branch("me/client", branch="v2")
(folder / "README.md").write_text("second")
(folder / "inner" / "empty.txt").unlink()
api.upload_folder(repo_id="me/client", folder_path=folder, revision="v2", delete_patterns="inner/*")
assert Path(hf_hub_download("me/client", "README.md", revision="v2")).read_text() == "second"
assert Path(hf_hub_download("me/client", "README.md")).read_text().endswith("über\\n")
assert Path(hf_hub_download("me/client", "README.md", revision=first)).read_text().endswith("über\\n")
assert "inner/empty.txt" not in api.list_repo_files("me/client", revision="v2")
for error, arguments in ((RevisionNotFoundError, ("README.md", "v3")), (EntryNotFoundError, ("none", "main"))):
    try:
        hf_hub_download("me/client", arguments[0], revision=arguments[1])
    except error:
        continue
    raise AssertionError(error)

# into a directory, where a download that was cut off goes on
snapshot_download("me/client", local_dir=target)
assert (target / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

ModelCard("---\\nlicense: mit\\n---\\n").validate()
try:
    ModelCard("---\\nlicense: my own\\n---\\n").validate()
except ValueError as error:
    assert "license" in str(error)
else:
    raise AssertionError("a wrong card passed")
"""
    run(code, folder, tmp_path / "target")
    uploads = [path for method, path, _ in hub.requests if method == "PUT"]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert uploads.count(f"/lfs/{digest}") == 1
    assert set(hub.files("me/client", revision="v2")) == {"README.md", "model.safetensors"}


def test_tokens_decide_what_is_seen_and_written(hub, run):
    hub.put("me/secret", {"config.json": b"{}"}, private=True)
    code = """
import sys
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

api, seen = HfApi(), []
for action in (
    lambda: hf_hub_download("me/secret", "config.json"),
    lambda: api.upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="me/secret"),
    lambda: api.create_repo("me/new", private=True, exist_ok=True),
    lambda: api.whoami(),
):
    try:
        action()
        seen.append("yes")
    except RepositoryNotFoundError as error:
        seen.append(f"{error.response.status_code} hidden")
    except HfHubHTTPError as error:
        seen.append(str(error.response.status_code))
print(seen)
"""
    assert run(code).strip() == "['yes', 'yes', 'yes', 'yes']"
    assert run(code, token="hf_others").strip() == "['404 hidden', '404 hidden', '403', 'yes']"
    nobody = run(code, token="hf_unknown")
    assert "yes" not in nobody and nobody.count("401") == 4, nobody
    assert hub.repo("me/new").private


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [("bytes=2-4", 206, b"234"), ("bytes=7-", 206, b"789"), ("bytes=3-99", 206, b"3456789"), ("bytes=10-", 416, None)],
)
def test_parts_of_a_file(hub, wanted, status, content):
    hub.put("me/parts", {"digits.txt": b"0123456789"})
    request = urllib.request.Request(f"{hub.endpoint}/me/parts/resolve/main/digits.txt", headers={"Range": wanted})
    try:
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read()) == (status, content)
    except urllib.error.HTTPError as error:
        assert error.code == status
