//! Runs a script of the shell in a build and prints the file that it makes, named out: client SOCKET SCRIPT

use std::{
    env,
    error::Error,
    io::{self, Write as _},
};

use cofferdam::v1::{BuildRequest, build_service_client::BuildServiceClient, done::Outcome, event::Event};
use snix::{
    build::v1::{BuildRequest as Request, build_request::BuildConstraints},
    castore::v1::{ReadBlobRequest, blob_service_client::BlobServiceClient, entry::Entry},
};
use tonic::transport::Endpoint;

pub mod cofferdam {
    pub mod v1 {
        tonic::include_proto!("cofferdam.v1");
    }
}

pub mod snix {
    pub mod build {
        pub mod v1 {
            tonic::include_proto!("snix.build.v1");
        }
    }
    pub mod castore {
        pub mod v1 {
            tonic::include_proto!("snix.castore.v1");
        }
    }
}

#[tokio::main]
pub async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(socket), Some(script)) = (arguments.next(), arguments.next()) else {
        return Err("usage: client SOCKET SCRIPT".into());
    };
    Ok(io::stdout().write_all(&build(&socket, &script).await?)?)
}

pub async fn build(socket: &str, script: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    let channel = Endpoint::from_shared(format!("unix://{socket}"))?.connect().await?;
    let request = Request {
        command_args: ["/bin/sh", "-c", script].map(Into::into).into(),
        working_dir: "build".into(),
        scratch_paths: vec!["build".into()],
        inputs_dir: "inputs".into(),
        outputs: vec!["build/out".into()],
        constraints: Some(BuildConstraints {
            system: "x86_64-linux".into(),
            provide_bin_sh: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = BuildRequest { request: Some(request), ..Default::default() };
    let mut events = BuildServiceClient::new(channel.clone()).build(request).await?.into_inner();
    let mut outcome = None;
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Log(chunk)) => io::stderr().write_all(&chunk.data)?,
            Some(Event::Done(done)) => outcome = done.outcome,
            _ => {}
        }
    }
    let response = match outcome {
        Some(Outcome::Success(success)) => success.response.unwrap_or_default(),
        Some(Outcome::Failure(failure)) => {
            return Err([vec![failure.message], failure.causes].concat().join(": ").into());
        }
        None => return Err("the daemon doesn't say what came of the build".into()),
    };
    let output = response.outputs.into_iter().next().and_then(|output| output.output?.entry);
    let Some(Entry::File(file)) = output else { return Err("the output is no file".into()) };
    let asked = ReadBlobRequest { digest: file.digest };
    let mut chunks = BlobServiceClient::new(channel).read(asked).await?.into_inner();
    let mut contents = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        contents.extend(chunk.data);
    }
    Ok(contents)
}
