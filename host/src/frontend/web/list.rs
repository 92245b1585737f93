//! The list of builds.

use std::time::{Duration, SystemTime};

use askama::Template;
use cofferdam_rpc::Page;
use tonic::codegen::http::StatusCode;

use super::{
    Ask, Site,
    answer::{self, Frame, Problem},
    build::{age, shown, state_word, waits_for},
    path,
};
use crate::{
    quantity::show_duration,
    records::{BuildId, Record, Status},
    scheduler::Listed,
};

/// Builds on a page.
const LISTED: usize = 100;

/// Which builds are wanted.
const FILTERS: [(&str, &str); 4] =
    [("", "all"), ("active", "waiting or running"), ("succeeded", "succeeded"), ("failed", "failed")];

#[derive(Template)]
#[template(path = "list.html")]
struct List {
    frame: Frame,
    /// Each with whether it is the chosen one.
    filters: Vec<(&'static str, &'static str, bool)>,
    search: String,
    is_operator: bool,
    builds: Vec<Line>,
    /// The address of the page with older ones.
    older: Option<String>,
    newest: Option<String>,
    /// The address of the same page that loads itself, or no longer does.
    live: String,
}

struct Line {
    id: String,
    short_id: String,
    state: &'static str,
    command: String,
    client: String,
    age: String,
    time: String,
    took: Option<String>,
    why: Option<String>,
}

impl Site {
    pub(super) async fn list(&self, ask: &Ask) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let _turn = self.turn(&self.pages, client).await?;
        let (state, search) =
            (ask.question.get("state").unwrap_or_default(), ask.question.get("q").unwrap_or_default());
        let before = ask.question.get("before").map(super::build_id).transpose()?;
        let is_live = ask.question.has("live");
        let wanted = wanted(state, search, self.scheduler.is_operator(client))?;
        let page = self.scheduler.list(client, wanted, before, LISTED).await?;
        let now = SystemTime::now();
        let line = |listed: Listed| Line::of(&listed, self.scheduler.owner_for(client, &listed.record), now);
        let address = |before: Option<BuildId>, is_live: bool| {
            let values = [
                ("state", state.to_owned()),
                ("q", search.to_owned()),
                ("before", before.map(|id| id.to_string()).unwrap_or_default()),
            ];
            let values = values.iter().filter(|(_, value)| !value.is_empty());
            let mut pairs: Vec<_> =
                values.map(|(name, value)| format!("{name}={}", path::encoded(value.as_bytes()))).collect();
            pairs.extend(is_live.then(|| "live=1".to_owned()));
            format!("/?{}", pairs.join("&"))
        };
        let list = List {
            frame: Frame { is_live, ..Frame::of(&ask.guest) },
            filters: FILTERS.map(|(value, words)| (value, words, value == state)).to_vec(),
            search: search.to_owned(),
            is_operator: self.scheduler.is_operator(client),
            builds: page.builds.into_iter().map(line).collect(),
            older: page.next.map(|next| address(Some(next), false)),
            newest: before.map(|_| address(None, false)),
            live: address(before, !is_live),
        };
        Ok(answer::page(StatusCode::OK, &list))
    }
}

/// What is asked for. Who is no operator doesn't find builds by the names of others who share them.
fn wanted(state: &str, search: &str, is_operator: bool) -> Result<impl Fn(&Record) -> bool + Send + 'static, Problem> {
    let status = match state {
        "" => None,
        "active" => Some(Status::Unfinished),
        "succeeded" => Some(Status::Built),
        "failed" => Some(Status::Failed),
        _ => return Err(Problem::wrong("state must be active, succeeded or failed")),
    };
    let search = search.to_lowercase();
    Ok(move |record: &Record| {
        let has = |text: &str| text.to_lowercase().contains(&search);
        status.is_none_or(|status| record.status() == status)
            && (search.is_empty()
                || has(&record.description)
                || record.id.to_string().starts_with(&search)
                || (is_operator && has(&record.client)))
    })
}

impl Line {
    fn of(Listed { record, state }: &Listed, client: String, now: SystemTime) -> Self {
        let id = record.id.to_string();
        let took = record.ended.map(|ended| {
            let started = record.phases.get(1).map_or(ended, |(_, begun)| *begun);
            show_duration(ended.saturating_sub(started))
        });
        Self {
            short_id: id.chars().take(13).collect(),
            id,
            state: state_word(record, state.as_ref()),
            command: shown(&record.description),
            client,
            age: age(record.created, now),
            time: super::build::time(record.created, Duration::ZERO),
            took,
            why: waits_for(state.as_ref()),
        }
    }
}
