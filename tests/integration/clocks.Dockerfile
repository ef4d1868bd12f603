# An image of ours whose processes see clocks that are SHIFT away (-7m, +11m): the kernel has one clock for all containers.
ARG OF
ARG PYTHON=3.11-slim-bookworm
FROM ${OF} AS of

FROM python:${PYTHON}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends faketime && rm -rf /var/lib/apt/lists/* \
    && printf '#!/bin/sh\nexec faketime -f "$SHIFT" "$@"\n' >/shifted && chmod 755 /shifted
COPY --from=of /usr/local /usr/local
USER 10001:10001
ENTRYPOINT ["/shifted"]
