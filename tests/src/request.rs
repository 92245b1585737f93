//! Requests as clients of a daemon send them.

use cofferdam::request::{BuildRequest, SYSTEM};
use cofferdam_proto::{EncodedRequest, snix::build::v1 as proto};

/// A script for the shell that the guest provides, with its outputs.
pub fn shell(script: &str, outputs: &[&str]) -> proto::BuildRequest {
    let strings = |items: &[&str]| items.iter().map(ToString::to_string).collect();
    proto::BuildRequest {
        command_args: strings(&["/bin/sh", "-c", script]),
        working_dir: "build".into(),
        scratch_paths: strings(&["build"]),
        inputs_dir: "inputs".into(),
        outputs: strings(outputs),
        constraints: Some(proto::build_request::BuildConstraints {
            system: SYSTEM.into(),
            provide_bin_sh: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A right request in the form that is sent.
pub fn encoded(request: proto::BuildRequest) -> EncodedRequest {
    (&BuildRequest::try_from(request).expect("the request is right")).into()
}
