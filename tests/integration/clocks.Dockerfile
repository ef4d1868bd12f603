# An image of ours whose processes see a wrong time, SHIFT_S seconds away: the kernel has one clock for all containers. How time
# passes stays as it is (faketime shifts that too, and then a wait of a tenth of a second lasts until the kernel's clock is there).
ARG OF
FROM ${OF}
USER root
RUN mkdir /shifted && printf '%s\n' \
    'import os, time' \
    'shift_s, now, now_ns = int(os.environ["SHIFT_S"]), time.time, time.time_ns' \
    'time.time = lambda: now() + shift_s' \
    'time.time_ns = lambda: now_ns() + shift_s * 1_000_000_000' >/shifted/sitecustomize.py
ENV PYTHONPATH=/shifted
USER 10001:10001
