"""The JobSet manifests against the schema of the JobSet resource, and what their pods detect."""

import copy
import json
import re

import pytest
import yaml
from launching import HERE, LAUNCH

from jaxcompress.training.distributed import EXIT_PREEMPTED, detect

jsonschema = pytest.importorskip("jsonschema")

NAMES = ["jobset.yaml", "jobset-tpu.yaml"]


def strict(schema):
    """The schema with unknown fields forbidden, as the API server does under strict validation."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    if isinstance(made.get("properties"), dict) and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def validator():
    schema = strict(json.loads((HERE / "jobset_v1alpha2.json").read_text()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def manifest(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def job(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(manifest):
    return job(manifest)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", NAMES)
def test_manifest_is_valid(name, validator):
    loaded = manifest(name)
    assert (loaded["apiVersion"], loaded["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert [error.message for error in validator.iter_errors(loaded)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_finds_mistakes(name, validator):
    """A schema that lets everything pass would prove nothing."""
    good = manifest(name)
    misspelt, wrong, incomplete = (copy.deepcopy(good) for _ in range(3))
    job(misspelt)["paralelism"] = 4
    job(wrong)["completions"] = "four"
    del container(incomplete)["name"]
    for bad in (misspelt, wrong, incomplete):
        assert not validator.is_valid(bad)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_pod_restarts_the_run(name):
    loaded = manifest(name)
    spec = job(loaded)
    assert loaded["spec"]["failurePolicy"]["maxRestarts"] > 0
    # One pod's failure is the job's, and that the JobSet's, whose pods then all start again.
    assert spec["backoffLimit"] == 0
    # The API server allows a pod failure policy with this policy alone.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    evicted, preempted = spec["podFailurePolicy"]["rules"]
    assert evicted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert preempted["action"] == "FailJob"
    name, codes = preempted["onExitCodes"]["containerName"], preempted["onExitCodes"]["values"]
    assert (name, codes) == (container(loaded)["name"], [EXIT_PREEMPTED])
    assert spec["parallelism"] == spec["completions"]


def test_the_pods_find_each_other():
    """Environment variables as the kubelet fills them in, for every pod."""
    loaded = manifest("jobset.yaml")
    spec, coordinator = job(loaded), loaded["spec"]["coordinator"]
    replicated = loaded["spec"]["replicatedJobs"][0]["name"]
    assert coordinator == {"replicatedJob": replicated, "jobIndex": 0, "podIndex": 0}
    endpoint = f"jaxcompress-{replicated}-0-0.jaxcompress"
    for index in range(spec["completions"]):
        environment = {"JOB_COMPLETION_INDEX": str(index)}
        for entry in container(loaded)["env"]:
            if "valueFrom" in entry:
                field = entry["valueFrom"]["fieldRef"]["fieldPath"]
                assert field == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
                environment[entry["name"]] = endpoint
            else:
                environment[entry["name"]] = expanded(entry["value"], environment)
        found, arguments = detect(environment)
        assert found == "kubernetes"
        assert arguments["coordinator_address"] == f"{endpoint}:8476"
        assert (arguments["process_id"], arguments["num_processes"]) == (index, spec["completions"])


def expanded(value, environment):
    """Kubernetes fills in $(NAME) of the variables that stand before."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], value)
