//! `web-token`: signs in to a daemon's page.

use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use cofferdam_proto::cofferdam::v1::WebTokenRequest;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{CliError, ClientArgs, remote};
use crate::machine::jail::one_line;

const EXAMPLES: &str = "\
Examples:
  cofferdam web-token
  cofferdam web-token | wl-copy";

/// Prints a token for the page of a daemon that has [web] in its configuration
///
/// Whoever has the token sees what you see of the daemon's builds and store, for 12 hours or until the daemon ends. stdout gets the
/// token, stderr the page's address; with --json stdout gets an object with both.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct WebTokenArgs {}

impl WebTokenArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let daemon = remote::Daemon::at_or_own(client.daemon())?;
        let answer = daemon.answer(daemon.client().web_token(WebTokenRequest {}), cancel).await?;
        let [token, address] = [&answer.token, &answer.address].map(|text| one_line(text));
        let expires = UNIX_EPOCH + Duration::from_secs(answer.expires_unix_s.min(u32::MAX.into()));
        let expires = humantime::format_rfc3339_seconds(expires).to_string();
        eprintln!("sign in at {address}/sign-in until {expires} with");
        client.print(&format!("{token}\n"), &json!({ "token": token, "address": address, "expires": expires }))
    }
}
