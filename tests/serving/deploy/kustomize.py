# SPDX-License-Identifier: Apache-2.0
"""Kustomize as far as the manifests of this project use it, for machines that have neither kustomize nor kubectl.

It knows ``resources``, ``namespace``, ``labels`` (of objects alone), ``images`` and ``patches`` (strategic merges from files); anything
else is an error, not ignored. Where there is a kubectl, the tests hold it against that.
"""

from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "resources", "namespace", "labels", "images", "patches"}
_CLUSTER_WIDE = {"Namespace"}
# Lists that are merged by a key of their elements; all others are replaced as a whole.
_KEYED = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}


def render(folder: Path) -> list[Object]:
    """The objects of a folder with a kustomization."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := set(content) - _KNOWN:
        raise ValueError(f"{folder}: the loader does not know {sorted(unknown)}")
    objects: list[Object] = []
    for name in content["resources"]:
        path = folder / name
        objects += render(path.resolve()) if path.is_dir() else read(path)
    for patch in content.get("patches", ()):
        if set(patch) != {"path"}:
            raise ValueError(f"{folder}: the loader knows patches from files alone, got {patch}")
        for change in read(folder / patch["path"]):
            (target,) = [each for each in objects if key_of(each) == key_of(change)]
            merge(target, change)
    for each in objects:
        if "namespace" in content and each["kind"] not in _CLUSTER_WIDE:
            each["metadata"]["namespace"] = content["namespace"]
        for labels in content.get("labels", ()):
            if set(labels) != {"pairs"}:
                raise ValueError(f"{folder}: the loader knows labels of objects alone, got {labels}")
            each["metadata"].setdefault("labels", {}).update(labels["pairs"])
        for image in content.get("images", ()):
            for container in containers(each):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def read(path: Path) -> list[Object]:
    """The objects of a file."""
    # Through JSON's types: an anchor would make two places one object.
    return [_copied(each) for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def key_of(each: Object) -> tuple[str, str]:
    return each["kind"], each["metadata"]["name"]


def pod_spec(each: Object) -> Object | None:
    """What the pods of an object are; None where it has none."""
    if each["kind"] == "Deployment":
        return each["spec"]["template"]["spec"]
    if each["kind"] == "CronJob":
        return each["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return None


def containers(each: Object) -> list[Object]:
    """All containers of an object's pods."""
    pods = pod_spec(each) or {}
    return [*pods.get("initContainers", ()), *pods.get("containers", ())]


def merge(target: Object, change: Object) -> None:
    """A strategic merge of one map into another."""
    for name, value in change.items():
        own = target.get(name)
        if isinstance(value, dict) and isinstance(own, dict):
            merge(own, value)
        elif name in _KEYED and isinstance(value, list) and isinstance(own, list):
            for element in value:
                same = [each for each in own if each[_KEYED[name]] == element[_KEYED[name]]]
                if same:
                    merge(same[0], element)
                else:
                    own.append(element)
        else:
            target[name] = value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
