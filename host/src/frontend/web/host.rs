//! The daemon: its budget and standby machines, and what clients have of its disk.

use askama::Template;
use cofferdam_rpc::Page;
use tonic::codegen::http::StatusCode;

use super::{
    Ask, Site,
    answer::{self, Frame, Problem},
    build::shown,
};
use crate::{
    disk::Space,
    quantity::show_size,
    scheduler::{ClientUsage, queue::Waiting},
};

#[derive(Template)]
#[template(path = "daemon.html")]
struct DaemonPage {
    frame: Frame,
    version: &'static str,
    /// For operators alone.
    budget: Vec<Meter>,
    waiting: Vec<(&'static str, i64)>,
    standby: Option<(i64, i64)>,
    disk: Option<String>,
    clients: Vec<ClientLine>,
}

/// How much of something is in use. Of clients, so much as their limit allows.
struct Meter {
    name: &'static str,
    used: i64,
    most: i64,
    text: String,
}

struct ClientLine {
    client: String,
    stored: String,
    running: String,
    recorded: String,
}

impl Site {
    pub(super) async fn host(&self, ask: &Ask) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let _turn = self.turn(&self.pages, client).await?;
        let usages = self.scheduler.usage(client).await?;
        let is_operator = self.scheduler.is_operator(client);
        let gauges = is_operator.then(|| self.metrics.gauges(&Waiting::WORDS));
        let meter = |(name, used, most): (&'static str, i64, i64)| {
            let show = |amount: i64| match name {
                "Memory" => show_size(u64::try_from(amount).unwrap_or(0)),
                _ => amount.to_string(),
            };
            Meter { name, used, most, text: format!("{} of {}", show(used), show(most)) }
        };
        let page = DaemonPage {
            frame: Frame { is_live: ask.question.has("live"), ..Frame::of(&ask.guest) },
            version: env!("CARGO_PKG_VERSION"),
            budget: gauges.iter().flat_map(|gauges| gauges.budget).map(meter).collect(),
            waiting: gauges
                .iter()
                .flat_map(|gauges| &gauges.waiting)
                .filter(|(_, count)| *count > 0)
                .map(|(word, count)| (awaited(word), *count))
                .collect(),
            standby: gauges.as_ref().map(|gauges| gauges.standby),
            disk: gauges.as_ref().and_then(|gauges| gauges.space).map(disk),
            clients: usages.iter().map(ClientLine::of).collect(),
        };
        Ok(answer::page(StatusCode::OK, &page))
    }
}

fn disk(Space { total, free }: Space) -> String {
    let [used, free, total] = [total.saturating_sub(free), free, total].map(show_size);
    format!("{used} in use, {free} free, of {total}")
}

/// What builds wait for, by the scheduler's word for it.
fn awaited(word: &'static str) -> &'static str {
    match word {
        "builds" => "the end of another build",
        "memory" => "free memory",
        "cpus" => "free CPUs",
        "disk" => "free space on the disk",
        "tenant" => "the end of a build of their tenant",
        "quota" => "room in their tenant's quota",
        "turn" => "builds before them",
        _ => word,
    }
}

fn builds(count: u64) -> String {
    match count {
        1 => "1 build".to_owned(),
        _ => format!("{count} builds"),
    }
}

impl ClientLine {
    fn of(ClientUsage { client, stored, running, recorded, allowed }: &ClientUsage) -> Self {
        let of = |bytes: u64, limit: Option<u64>| match limit {
            Some(limit) => format!("{} of {}", show_size(bytes), show_size(limit)),
            None => show_size(bytes),
        };
        Self {
            client: shown(client),
            stored: stored.map_or_else(
                || "not counted: all see the whole store".to_owned(),
                |usage| format!("{} in {} blobs and directories", of(usage.bytes, allowed.stored), usage.objects),
            ),
            running: format!(
                "{}, which may grow to {}",
                builds(running.builds.into()),
                of(running.disk_bytes, allowed.terms.disk)
            ),
            recorded: format!("{}, {}", builds(recorded.records), of(recorded.bytes, allowed.records)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_a_phrase_for_all_that_builds_wait_for() {
        for word in Waiting::WORDS {
            assert_ne!(awaited(word), word);
        }
    }
}
