"""A client of cofferdam.v1 and snix.build.v1, made only from the published .proto files.

Arguments: the path of a socket for a channel without options, and the path of a socket for a channel that names the server
localhost. Prints the version of gRPC, and exits with 0 if the daemon follows the protocol.
"""

import json
import sys

import cofferdam_v1_pb2 as ours
import cofferdam_v1_pb2_grpc as services
import grpc
import snix_build_v1_pb2 as snix
import snix_build_v1_pb2_grpc as snix_services

socket, socket_of_localhost = sys.argv[1:]
print(grpc.__version__)


def shell(script, outputs=()):
    return snix.BuildRequest(
        command_args=["/bin/sh", "-c", script],
        working_dir="build",
        scratch_paths=["build"],
        inputs_dir="inputs",
        outputs=outputs,
        constraints=snix.BuildRequest.BuildConstraints(system="x86_64-linux", provide_bin_sh=True),
        refscan_needles=["needle"],
    )


def refusal(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("it was not refused")


localhost = grpc.insecure_channel(f"unix:{socket_of_localhost}", [("grpc.default_authority", "localhost")])
assert not services.BuildServiceStub(localhost).List(ours.ListRequest()).builds

channel = grpc.insecure_channel(f"unix:{socket}")
builds = services.BuildServiceStub(channel)

request = ours.BuildRequest(request=shell("echo said; echo a needle > out", ["build/out"]))
events = list(builds.Build(request))
kinds = [event.WhichOneof("event") for event in events]
assert kinds[0] == "accepted" and kinds[-1] == "done", kinds
assert {"phase", "log"} <= set(kinds), kinds
assert b"".join(event.log.data for event in events if event.HasField("log")) == b"said\n"
build_id = events[0].accepted.id
(output,) = events[-1].done.success.response.outputs
assert output.output.WhichOneof("entry") == "file" and output.output.file.size == 9, output
assert list(output.needles) == [0]

answer = snix_services.BuildServiceStub(channel).DoBuild(request.request)
assert answer.outputs[0] == output

info = builds.Get(ours.GetRequest(id=build_id))
assert info.state == ours.BuildInfo.STATE_SUCCEEDED and info.log_bytes == 5, info
assert [build.id for build in builds.List(ours.ListRequest()).builds] == [build_id]
log = b"".join(chunk.data for chunk in builds.Log(ours.LogRequest(id=build_id, offset=2)))
assert log == b"id\n", log

*_, last = builds.Build(ours.BuildRequest(request=shell("exit 7")))
failure = last.done.failure
assert failure.kind == ours.Failure.KIND_BUILD_FAILED and failure.reason == "exit_code", failure
assert json.loads(failure.fields["exit_code"]) == 7

failed = refusal(lambda: snix_services.BuildServiceStub(channel).DoBuild(shell("echo last words; exit 8")))
assert failed.code() == grpc.StatusCode.ABORTED, failed
assert "status 8" in failed.details() and "last words" in failed.details(), failed
details = dict(failed.trailing_metadata())["grpc-status-details-bin"]
assert b"google.rpc.ErrorInfo" in details and b"EXIT_CODE" in details, details

wrong = refusal(lambda: list(builds.Build(ours.BuildRequest())))
assert wrong.code() == grpc.StatusCode.INVALID_ARGUMENT and "command_args" in wrong.details(), wrong
assert refusal(lambda: builds.Get(ours.GetRequest(id="x"))).code() == grpc.StatusCode.NOT_FOUND
