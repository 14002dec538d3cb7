"""The reference page: complete, and its links lead somewhere."""

import re

from servingtiers.api.crd import crd_documents
from servingtiers.api.reference import reference_page

PAGE = reference_page()


def test_every_field_of_the_crd_has_a_row() -> None:
    """Also those of nested lists and of the status."""
    found: set[str] = set()

    def collect(node: dict) -> None:
        for name, child in node.get("properties", {}).items():
            found.add(name)
            collect(child)
        if "items" in node:
            collect(node["items"])

    for document in crd_documents():
        root = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
        collect(root["spec"])
        collect(root["status"])
    rows = set(re.findall(r"^\| \**`(\w+)`\** \|", PAGE, re.MULTILINE))

    assert rows == found


def test_every_rule_is_on_the_page() -> None:
    """In the words that a user gets to read when it is broken."""
    found: list[str] = []

    def collect(node: object) -> None:
        if isinstance(node, dict):
            found.extend(rule["message"] for rule in node.get("x-kubernetes-validations", ()))
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                collect(child)

    collect(list(crd_documents()))

    assert found
    assert [message for message in found if message not in PAGE] == []


def test_every_link_leads_to_a_heading_of_the_page() -> None:
    """Anchors are made as GitHub makes them: lower case, without punctuation."""
    headings = {
        re.sub(r"[^a-z0-9_-]", "", heading.lower())
        for heading in re.findall(r"^#+ `(.*)`$", PAGE, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#(.*?)\)", PAGE))

    assert links
    assert links <= headings


def test_objects_of_one_shape_share_a_section() -> None:
    """Three copies of the engine's fields would bury what differs."""
    assert PAGE.count("| `maxNumSeqs` | integer |") == 1
    assert "Also `spec.disaggregation.prefill.engine`, `spec.disaggregation.decode.engine`." in PAGE
