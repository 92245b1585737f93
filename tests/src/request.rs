//! Requests in the form that clients send to a daemon.

use cofferdam::request::{BuildRequest, SYSTEM};
use cofferdam_proto::{EncodedRequest, snix::build::v1 as proto};

/// A request for a script, which runs in the guest's shell, with these outputs.
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

/// A valid request in the form that is sent.
pub fn encoded(request: proto::BuildRequest) -> EncodedRequest {
    (&BuildRequest::try_from(request).expect("the request is right")).into()
}
