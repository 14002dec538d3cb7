# Stands in for python:3-slim where no registry can be reached; the context is a Debian root.
FROM scratch
COPY . /
ENV LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python3"]
