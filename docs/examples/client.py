"""Runs a script of the shell in a build and prints the file that it makes, named out: client.py SOCKET SCRIPT"""

import sys

import cofferdam_v1_pb2 as cofferdam
import cofferdam_v1_pb2_grpc as cofferdam_services
import grpc
import rpc_blobstore_pb2 as blobs
import rpc_blobstore_pb2_grpc as blob_services
from snix_build_v1_pb2 import BuildRequest

socket, script = sys.argv[1:]
channel = grpc.insecure_channel(f"unix:{socket}", [("grpc.default_authority", "localhost")])
request = BuildRequest(
    command_args=["/bin/sh", "-c", script],
    working_dir="build",
    scratch_paths=["build"],
    inputs_dir="inputs",
    outputs=["build/out"],
    constraints=BuildRequest.BuildConstraints(system="x86_64-linux", provide_bin_sh=True),
)
for event in cofferdam_services.BuildServiceStub(channel).Build(cofferdam.BuildRequest(request=request)):
    if event.HasField("log"):
        sys.stderr.buffer.write(event.log.data)
if event.done.HasField("failure"):
    sys.exit(": ".join([event.done.failure.message, *event.done.failure.causes]))
digest = event.done.success.response.outputs[0].output.file.digest
for chunk in blob_services.BlobServiceStub(channel).Read(blobs.ReadBlobRequest(digest=digest)):
    sys.stdout.buffer.write(chunk.data)
