"""BitFit: what the laws try of it; PEFT has no such method."""

LAWS = [{}]
PEFT: dict[str, tuple[object, dict[str, object]]] = {}
