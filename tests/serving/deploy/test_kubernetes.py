# SPDX-License-Identifier: Apache-2.0
"""The manifests render, are valid for several versions of Kubernetes, and name what exists: settings, routes, ports, files, objects."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipelines.cli import VERBS, step
from pipelines.pipeline import NAMES
from recsys.registry.location import ARTIFACTS, HOME, TRACKING_URI
from serving.app import create_app
from serving.deploy import stores
from serving.engine import Engine
from serving.security.credentials import PUBLIC_KEY, SECRET
from serving.settings import PREFIX, Settings
from tests.serving.deploy.kustomize import Object, containers, key_of, pod_spec, render
from tests.serving.support import Switch

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "serving" / "deploy" / "kubernetes"
FOLDERS = {"base": MANIFESTS / "base", "cpu": MANIFESTS / "overlays" / "cpu", "gpu": MANIFESTS / "overlays" / "gpu"}
VERSIONS = ("1.30.0", "1.37.0")
"""The oldest in which every field is stable, and the newest whose schemas the package holds."""

OURS = {HOME, TRACKING_URI, ARTIFACTS, SECRET, PUBLIC_KEY}
FOREIGN = {"OMP_NUM_THREADS", "XDG_CACHE_HOME", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
SECRETS = {TRACKING_URI, ARTIFACTS, SECRET, PUBLIC_KEY, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


@pytest.fixture(params=FOLDERS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(FOLDERS[request.param])


def one(objects: list[Object], kind: str, name: str = "recsys") -> Object:
    (found,) = [each for each in objects if key_of(each) == (kind, name)]
    return found


def server(objects: list[Object]) -> tuple[Object, Object]:
    """The pods of the server, and its container."""
    pods = pod_spec(one(objects, "Deployment"))
    assert pods is not None
    (container,) = pods["containers"]
    return pods, container


def settings_of(objects: list[Object]) -> Settings:
    return Settings.from_environment(one(objects, "ConfigMap", "recsys-settings")["data"])


# --- rendering and schemas


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", FOLDERS)
def test_kustomize_renders_what_the_loader_renders(name: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDERS[name]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    real = {key_of(each): each for each in yaml.safe_load_all(done.stdout)}
    assert {key_of(each): each for each in render(FOLDERS[name])} == real


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(objects: list[Object], version: str) -> None:
    for each in objects:
        assert kubernetes_validate.validate(each, version, strict=True) == version.rpartition(".")[0]


def test_the_schemas_refuse_what_is_wrong() -> None:
    deployment = one(render(FOLDERS["base"]), "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[1], strict=True)


def test_every_file_belongs_to_a_kustomization() -> None:
    for folder in (*FOLDERS.values(),):
        content = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = {*content["resources"], *(patch["path"] for patch in content.get("patches", ()))} | {"kustomization.yaml"}
        assert {path.name for path in folder.iterdir()} == {name for name in named if not name.startswith("..")}


# --- what is named exists


def test_every_variable_is_read_by_somebody(objects: list[Object]) -> None:
    given = {variable["name"] for each in objects for container in containers(each) for variable in container.get("env", ())}
    given |= one(objects, "ConfigMap", "recsys-settings")["data"].keys()
    fields = {PREFIX + name.upper() for name in Settings.model_fields}
    assert given - fields - OURS - FOREIGN == set()
    assert settings_of(objects).port == 8000


def test_secrets_come_from_secrets(objects: list[Object]) -> None:
    assert SECRETS & one(objects, "ConfigMap", "recsys-settings")["data"].keys() == set()
    for each in objects:
        assert each["kind"] != "Secret"
        for variable in (variable for container in containers(each) for variable in container.get("env", ())):
            assert ("secretKeyRef" in variable.get("valueFrom", {})) == (variable["name"] in SECRETS)


def test_every_probe_asks_a_route_of_the_server(objects: list[Object]) -> None:
    paths = create_app(Engine(Switch(), Settings()), Settings()).openapi()["paths"]
    _, container = server(objects)
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/startupz",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    assert all(probe["path"] in paths and probe["port"] == "http" for probe in probes.values())


def test_all_mean_the_same_port(objects: list[Object]) -> None:
    _, container = server(objects)
    assert container["ports"] == [{"name": "http", "containerPort": settings_of(objects).port}]
    assert [port["targetPort"] for port in one(objects, "Service")["spec"]["ports"]] == ["http"]
    policy = one(objects, "NetworkPolicy", "recsys-server")
    assert [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]] == ["http"]


def test_there_is_time_for_the_sleep_the_grace_and_the_drain(objects: list[Object]) -> None:
    pods, container = server(objects)
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    own = settings_of(objects)
    assert command == "sleep" and pods["terminationGracePeriodSeconds"] > int(seconds) + own.grace_seconds + own.drain_seconds
    probe = container["readinessProbe"]
    unready_after = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert own.grace_seconds > unready_after, "whoever sends requests notices during the grace"


def test_selectors_select_the_servers_pods_and_no_others(objects: list[Object]) -> None:
    deployment = one(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one(objects, "Service")["spec"]["selector"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy", "recsys-server")["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in server(objects)[0]["topologySpreadConstraints"]),
    ]
    job = one(objects, "CronJob", "recsys-materialise")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    for selector in selectors:
        assert selector.items() <= labels.items() and not selector.items() <= job.items()
    assert one(objects, "NetworkPolicy", "recsys-nothing")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_autoscaler_alone_says_how_many_pods_there_are(objects: list[Object]) -> None:
    deployment, scaler = one(objects, "Deployment"), one(objects, "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in deployment["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    (metric,) = scaler["metrics"]
    assert metric["containerResource"]["container"] == server(objects)[1]["name"]


def test_pods_may_do_no_more_than_they_need(objects: list[Object]) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    assert user is not None
    for each in filter(pod_spec, objects):
        pods: Any = pod_spec(each)
        context = pods["securityContext"]
        assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        assert (context["runAsUser"], context["runAsGroup"]) == tuple(map(int, user.groups()))
        assert pods["automountServiceAccountToken"] is False
        assert one(objects, "ServiceAccount", pods["serviceAccountName"])["automountServiceAccountToken"] is False
        for container in containers(each):
            own = container["securityContext"]
            assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"], own["capabilities"]) == (True, False, {"drop": ["ALL"]})
            assert container["resources"]["requests"].keys() == {"cpu", "memory"} and "memory" in container["resources"]["limits"]
    assert one(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_is_written_goes_to_a_volume(objects: list[Object]) -> None:
    for each in filter(pod_spec, objects):
        pods: Any = pod_spec(each)
        volumes = {volume["name"] for volume in pods["volumes"]}
        mounted = {mount["name"] for container in containers(each) for mount in container["volumeMounts"]}
        assert mounted == volumes, "every mount has its volume, and every volume a mount"
    _, container = server(objects)
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    data = one(objects, "ConfigMap", "recsys-settings")["data"]
    for path in (data[HOME], data["XDG_CACHE_HOME"], "/tmp"):
        assert any(Path(path).is_relative_to(mount) for mount in writable)
    read_only = [mount["mountPath"] for mount in container["volumeMounts"] if mount.get("readOnly")]
    assert any(Path(data["RECSYS_SERVE_ACCESS"]).is_relative_to(mount) for mount in read_only)


def test_objects_that_are_named_are_there_or_told_of(objects: list[Object]) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    there = {key_of(each) for each in objects}
    for each in filter(pod_spec, objects):
        pods: Any = pod_spec(each)
        for volume in pods["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there
            if "configMap" in volume:
                assert f"`{volume['configMap']['name']}`" in page
            if "secret" in volume:
                assert f"`{volume['secret']['secretName']}`" in page
        for container in containers(each):
            assert [("ConfigMap", source["configMapRef"]["name"]) in there for source in container["envFrom"]] == [True]
            for variable in container.get("env", ()):
                if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert f"`{secret['name']}`" in page and f"`{secret['key']}`" in page


def test_every_command_is_one_of_ours(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [container["command"] for each in objects for container in containers(each)]
    copied: list[tuple[str, Path]] = []
    for name in ("publish", "fetch"):
        monkeypatch.setattr(stores, name, lambda _home, shared, name=name: copied.append((name, shared)) or [])
    for command in commands:
        if command[0] == "recsys":
            assert command[1] in VERBS
            if command[1] == "step":
                assert command[2] in NAMES and step.options("", "").parse_args(command[3:]).recipe == "/etc/recsys/recipe/recipe.yaml"
        else:
            assert command[:2] == ["python", "-m"] and find_spec(command[2]) is not None
            assert stores.main(command[3:]) == 0
    assert sorted(copied) == [("fetch", Path("/stores")), ("publish", Path("/stores"))]


def test_nobody_outside_reaches_what_administers(objects: list[Object]) -> None:
    """Routes below /admin are off, and where they are on a port of their own, that port is admitted by no policy and in no Service."""
    assert settings_of(objects).admin is False
    ports = [port for rule in one(objects, "NetworkPolicy", "recsys-server")["spec"]["ingress"] for port in rule["ports"]]
    assert {port["port"] for port in ports} == {"http"} and one(objects, "Service")["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_images_are_those_of_the_overlay() -> None:
    for name, folder in FOLDERS.items():
        images = {container["image"] for each in render(folder) for container in containers(each)}
        assert images == ({"recsys"} if name == "base" else {f"registry.example/recsys:0.1.0-{name}"})
    gpu = server(render(FOLDERS["gpu"]))[1]["resources"]["limits"]
    assert gpu["nvidia.com/gpu"] == 1 and "nvidia.com/gpu" not in server(render(FOLDERS["cpu"]))[1]["resources"]["limits"]
