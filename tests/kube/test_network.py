"""Who may speak with whom: nothing but the flows named here, each allowed at both of its ends, on ports that exist."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.kube.manifests import COMPONENT, JOBS, Pod, Tree, overlays, pods, rendered

KNOWN = ("mlflow", "postgres", "object-store", "ray-head", "ray-worker", "ray-submitter")
ANY = "any port"
OUTSIDE, DNS, OPERATOR, PROMETHEUS = "outside", "kube-dns", "kuberay-operator", "prometheus"
PEERS = {
    (("kubernetes.io/metadata.name", "kube-system"), ("k8s-app", "kube-dns")): DNS,
    (("kubernetes.io/metadata.name", "kuberay-system"), ("app.kubernetes.io/name", "kuberay-operator")): OPERATOR,
    (("bct/monitoring", "true"),): PROMETHEUS,
}
RAY = ("ray-head", "ray-worker")
AMONG_RAY = {(one, other, ANY) for one in RAY for other in RAY}
EVERYWHERE = {
    *AMONG_RAY,
    *((one, "mlflow", 5000) for one in RAY),
    *((one, OUTSIDE, 443) for one in RAY),
    *((PROMETHEUS, one, 8080) for one in RAY),
    ("mlflow", "postgres", 5432),
    ("ray-submitter", "ray-head", 8265),
    (OPERATOR, "ray-head", 8265),
}
STORED_OUTSIDE = {("mlflow", OUTSIDE, 443)}
STORED_INSIDE = {(one, "object-store", 7070) for one in ("mlflow", *RAY)}


class Flows(NamedTuple):
    """(from, to, port) that policies let out, and in; `names` are those who may ask for addresses."""

    out: set[tuple[str, str, Any]]
    into: set[tuple[str, str, Any]]
    names: set[str]


def selected(selector: Tree) -> set[str]:
    """The components that a pod selector means; only their label is used."""
    if not selector:
        return set(KNOWN)
    found = set(KNOWN)
    for key, value in selector.get("matchLabels", {}).items():
        assert key == COMPONENT, f"selects by {key}"
        found &= {value}
    for term in selector.get("matchExpressions", []):
        assert (term["key"], term["operator"]) == (COMPONENT, "In"), term
        found &= set(term["values"])
    return found


def peers(rule: Tree, side: str) -> Iterator[str]:
    """Who stands at the other end of a rule."""
    assert rule.get(side), "a rule without peers is for everybody"
    for peer in rule[side]:
        if "ipBlock" in peer:
            assert peer == {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}
            yield OUTSIDE
        elif "namespaceSelector" in peer:
            labels = [peer[key]["matchLabels"] for key in ("namespaceSelector", "podSelector") if key in peer]
            yield PEERS[tuple(item for one in labels for item in one.items())]
        else:
            yield from selected(peer["podSelector"])


def flows(documents: list[Tree]) -> Flows:
    """All that the policies allow."""
    found = Flows(set(), set(), set())
    for policy in (one["spec"] for one in documents if one["kind"] == "NetworkPolicy"):
        ours = selected(policy["podSelector"])
        for side, key in (("to", "egress"), ("from", "ingress")):
            assert key not in policy or key.capitalize() in policy["policyTypes"], "rules of a type that is not named"
            for rule in policy.get(key, []):
                ports = [port["port"] for port in rule.get("ports", [{"port": ANY}])]
                for other in peers(rule, side):
                    for us in ours:
                        if other == DNS:
                            found.names.add(us)
                            assert ports == [53, 53]
                        elif side == "to":
                            found.out.update((us, other, port) for port in ports)
                        else:
                            found.into.update((other, us, port) for port in ports)
    return found


@pytest.fixture(scope="module")
def standing() -> dict[str, list[Tree]]:
    return {name: rendered(folder) for name, folder in overlays().items()}


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot", "kueue"])
def test_nothing_flows_but_what_is_named(standing: dict[str, list[Tree]], overlay: str) -> None:
    documents = standing[overlay]
    denied = [one["spec"] for one in documents if one["metadata"]["name"] == "deny-all"]
    assert denied == [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]
    allowed = flows(documents)
    expected = EVERYWHERE | (STORED_INSIDE if overlay == "dev" else STORED_OUTSIDE)
    assert allowed.out | allowed.into == expected
    assert allowed.names == set(KNOWN)


def one_ended(allowed: Flows) -> set[tuple[str, str, Any]]:
    """Flows between our pods that only one of the two lets through."""
    return {flow for flow in allowed.out ^ allowed.into if {flow[0], flow[1]} <= set(KNOWN)}


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot", "kueue"])
def test_a_flow_is_let_out_where_it_begins_and_in_where_it_ends(standing: dict[str, list[Tree]], overlay: str) -> None:
    assert one_ended(flows(standing[overlay])) == set()


def test_a_flow_with_one_end_is_found(standing: dict[str, list[Tree]]) -> None:
    broken = copy.deepcopy(standing["gpu"])
    [postgres] = [one for one in broken if (one["kind"], one["metadata"]["name"]) == ("NetworkPolicy", "postgres")]
    del postgres["spec"]["ingress"]
    assert one_ended(flows(broken)) == {("mlflow", "postgres", 5432)}
    postgres["spec"]["ingress"] = [{"ports": [{"port": 5432}]}]
    with pytest.raises(AssertionError, match="for everybody"):
        flows(broken)


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot", "kueue"])
def test_what_is_let_in_is_listened_to(standing: dict[str, list[Tree]], overlay: str) -> None:
    every = pods(standing[overlay]) + [pod for job in JOBS for pod in pods(rendered(overlays()[overlay] / job))]

    def listens(pod: Pod) -> set[Any]:
        return {port["containerPort"] for container in pod.every for port in container.get("ports", [])} | {ANY}

    for _, to, port in flows(standing[overlay]).into:
        places = [pod for pod in every if pod.component == to]
        assert places, to
        assert all(port in listens(pod) for pod in places), (to, port)


@pytest.mark.parametrize("overlay", ["dev", "gpu", "spot", "kueue"])
def test_whoever_must_not_be_asked_to_go_has_a_budget(standing: dict[str, list[Tree]], overlay: str) -> None:
    budgets = [one["spec"] for one in standing[overlay] if one["kind"] == "PodDisruptionBudget"]
    assert {frozenset(selected(one["selector"])) for one in budgets} == {
        frozenset({component}) for component in ("mlflow", "postgres", "ray-head")
    }
    for budget in budgets:
        assert (budget.get("minAvailable"), budget.get("maxUnavailable")) in ((1, None), (None, 0))
