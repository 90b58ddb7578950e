"""What every committed result says of where it comes from."""

from minikv_compile.provenance import provenance

__all__ = ["provenance"]
