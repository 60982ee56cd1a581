# The demo in a container, without a GPU; the volume keeps its model, checkpoints and results:
#
#   docker build -t soap-notes .
#   docker run --rm -v soap-notes-demo:/app/demo/build soap-notes
FROM python:3.11-slim

# DeepSpeed compiles its optimizer.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY Makefile requirements-cpu.txt requirements-dev.txt ./
RUN make install GPU=0
COPY . .
CMD ["make", "demo", "GPU=0"]
