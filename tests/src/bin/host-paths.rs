//! Runs one build that may be shown paths of the host, as a daemon's configuration allows them.
//!
//! `host-paths RUN-DIRECTORY '{"/in/the/build": "/on/the/host"}' '["/asked/for"]' SCRIPT` prints the file `build/out`
//! that the script makes.

use std::{collections::BTreeMap, env, sync::Arc};

use anyhow::{Context, Result, anyhow, bail};
use cofferdam::{
    build::{Builder, Observer, Options, Phase, Settings},
    inputs,
    request::{
        AbsolutePath, BuildRequest, SYSTEM,
        proto::{self, build_request::BuildConstraints},
    },
};
use cofferdam_castore::{Node, Store};
use cofferdam_tests::{image, vmm};
use tokio::io::AsyncReadExt as _;
use tokio_util::sync::CancellationToken;

struct ToStderr;

impl Observer for ToStderr {
    fn phase(&self, _: Phase) {}

    fn log(&self, _: cofferdam_protocol::Stream, bytes: &[u8]) {
        eprint!("{}", String::from_utf8_lossy(bytes));
    }
}

fn main() -> Result<()> {
    if env::args().nth(1).as_deref() == Some(inputs::SUBCOMMAND) {
        return inputs::run_device().map_err(|error| anyhow!("the device failed: {error}"));
    }
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [run_dir, allowed, asked, script] = &arguments[..] else { bail!("four arguments are needed") };
    let mut settings = Settings::new(image().1.clone(), vmm::choice().clone(), run_dir.into());
    for (path, host) in serde_json::from_str::<BTreeMap<String, String>>(allowed)? {
        settings.ro_paths.insert(AbsolutePath::new(&path).map_err(|rule| anyhow!("{path} {rule}"))?, host.into());
    }
    let request = BuildRequest::try_from(proto::BuildRequest {
        command_args: ["/bin/sh", "-c", script].map(Into::into).into(),
        working_dir: "build".into(),
        scratch_paths: vec!["build".into()],
        inputs_dir: "inputs".into(),
        outputs: vec!["build/out".into()],
        constraints: Some(BuildConstraints {
            system: SYSTEM.into(),
            available_ro_paths: serde_json::from_str(asked)?,
            provide_bin_sh: true,
            ..BuildConstraints::default()
        }),
        ..proto::BuildRequest::default()
    })?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let store = Store::memory();
        let builder = Builder::new(store.clone(), settings)?;
        let options = Options { memory_bytes: 256 << 20, cpus: 1, ..Options::default() };
        let built = builder.build(&request, &options, Arc::new(ToStderr), &CancellationToken::new()).await?;
        let Some(Node::File { digest, .. }) = built.result.outputs.first().map(|output| &output.node) else {
            bail!("build/out is no file");
        };
        let mut text = String::new();
        let mut blob = store.blobs.open_read(digest).await?.context("the output is in the store")?;
        blob.read_to_string(&mut text).await?;
        print!("{text}");
        Ok(())
    })
}
