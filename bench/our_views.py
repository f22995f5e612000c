"""pyllava's image encoder on one view and on five, in the form of peer_torch.py; see compare.py."""

from __future__ import annotations

import argparse
import json

import views

from pyllava import _lib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True)
    parser.add_argument("--mmproj", required=True)
    parser.add_argument("-t", type=int, default=2)
    parser.add_argument("--precision", default="fast")
    options = parser.parse_args()
    model = _lib.ModelHandle(options.m, options.mmproj)
    session = _lib.SessionHandle(model, n_ctx=64, n_threads=options.t, n_views=5, precision=options.precision)
    print(json.dumps(views.measure(session.encode)))


if __name__ == "__main__":
    main()
