//! A build's log: a part of it, lines with some text in it, as it grows, or all of it as a file.

use std::mem;

use aho_corasick::AhoCorasick;
use askama::Template;
use bytes::Bytes;
use cofferdam_rpc::{Client, Page, Turn};
use tokio::{sync::mpsc, time::timeout};
use tonic::codegen::http::StatusCode;

use super::{
    Ask, Site,
    ansi::Ansi,
    answer::{self, Frame, Problem},
    build::{shown, state_word},
    download::{CutShort, PIECE_TIMEOUT, received},
    path,
};
use crate::{
    build::failure::Failure,
    quantity::show_size,
    records::{BuildId, LogReader, RecordsError},
};

/// Bytes of a log on a page.
const WINDOW_BYTES: u64 = 128 * 1024;

/// Bytes in which a line's beginning is looked for.
const LINE_BYTES: usize = 8 * 1024;

/// Bytes that are searched for one page.
const SEARCHED_BYTES: u64 = 16 * 1024 * 1024;

/// Lines that one page has found.
const MAX_HITS: usize = 100;

/// Bytes before and after what was found that are shown with it.
const AROUND_BYTES: usize = 200;

/// Bytes of the log from which on it is followed.
const TAIL_BYTES: u64 = 32 * 1024;

/// Bytes that are followed on one page: browsers get slow when a page is too large.
const FOLLOWED_BYTES: u64 = 4 * 1024 * 1024;

/// Stands in the template for what follows.
const FOLLOWED: &str = "<!--log-->";

#[derive(Template)]
#[template(path = "log.html")]
struct LogPage {
    frame: Frame,
    id: String,
    command: String,
    state: &'static str,
    is_active: bool,
    is_truncated: bool,
    size: String,
    /// What was looked for.
    find: String,
    /// HTML that [`Ansi`] has made.
    html: String,
    hits: Option<Vec<Hit>>,
    from: String,
    until: String,
    /// Offsets of other parts.
    earlier: Option<u64>,
    later: Option<u64>,
    /// The address where the search goes on.
    further: Option<String>,
}

#[derive(Template)]
#[template(path = "follow.html")]
struct FollowPage {
    frame: Frame,
    id: String,
    command: String,
}

/// A line that was found, as HTML that [`Ansi`] has made.
struct Hit {
    offset: u64,
    before: String,
    found: String,
    after: String,
}

/// Part of a log.
struct Part {
    start: u64,
    end: u64,
    bytes: Vec<u8>,
}

impl Site {
    pub(super) async fn log(&self, ask: &Ask, id: BuildId) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let _turn = self.turn(&self.pages, client).await?;
        let (record, state) = self.record(client, id).await?;
        let length = record.log.bytes;
        let find = ask.question.get("find").unwrap_or_default();
        let offset = ask.question.number("offset")?;
        let mut page = LogPage {
            frame: Frame::of(&ask.guest),
            id: id.to_string(),
            command: shown(&record.description),
            state: state_word(&record, state.as_ref()),
            is_active: record.outcome.is_none(),
            is_truncated: record.log.truncated,
            size: show_size(length),
            find: find.to_owned(),
            html: String::new(),
            hits: None,
            from: String::new(),
            until: String::new(),
            earlier: None,
            later: None,
            further: None,
        };
        let (start, end) = if find.is_empty() {
            let part = self.part(client, id, offset.unwrap_or(length.saturating_sub(WINDOW_BYTES))).await?;
            page.html = Ansi::default().html(&part.bytes);
            page.earlier = (part.start > 0).then(|| part.start.saturating_sub(WINDOW_BYTES));
            page.later = (part.end < length).then_some(part.end);
            (part.start, part.end)
        } else {
            let start = offset.unwrap_or(0);
            let (hits, end) = search(self.scheduler.read_log(client, id, start).await?, find).await?;
            page.hits = Some(hits);
            let further = || format!("/builds/{id}/log?find={}&offset={end}", path::encoded(find.as_bytes()));
            page.further = (end < length).then(further);
            (start, end)
        };
        (page.from, page.until) = (show_size(start), show_size(end));
        Ok(answer::page(StatusCode::OK, &page))
    }

    /// The lines from an offset on, or from the next line on, as many as a page has.
    async fn part(&self, client: &Client, id: BuildId, offset: u64) -> Result<Part, Problem> {
        // The byte before tells whether a line begins here.
        let begin = offset.saturating_sub(1);
        let mut reader = self.scheduler.read_log(client, id, begin).await?;
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < WINDOW_BYTES
            && let Some(piece) = reader.available().await.map_err(|error| unreadable(&error))?
        {
            bytes.extend_from_slice(&piece);
        }
        let is_whole = reader.available().await.map_err(|error| unreadable(&error))?.is_none();
        let skipped = match offset {
            0 => 0,
            _ => bytes.iter().take(LINE_BYTES).position(|byte| *byte == b'\n').map_or(1, |newline| newline + 1),
        };
        let newline = || bytes.iter().rposition(|byte| *byte == b'\n').filter(|newline| *newline >= skipped);
        let end = if is_whole { bytes.len() } else { newline().map_or(bytes.len(), |newline| newline + 1) };
        let bytes: Vec<u8> = bytes.get(skipped..end).unwrap_or_default().to_vec();
        let start = begin + skipped as u64;
        Ok(Part { start, end: start + bytes.len() as u64, bytes })
    }

    /// The log as it grows, to its end or to the end of what a page may have.
    pub(super) async fn follow(&self, ask: &Ask, id: BuildId) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let (record, _) = self.record(client, id).await?;
        let template =
            FollowPage { frame: Frame::of(&ask.guest), id: id.to_string(), command: shown(&record.description) };
        let html = template.render().unwrap_or_default();
        let (head, foot) = html.split_once(FOLLOWED).unwrap_or((&html, ""));
        let (head, foot) = (head.to_owned(), foot.to_owned());
        let start = record.log.bytes.saturating_sub(TAIL_BYTES);
        let mut reader = self.scheduler.read_log(client, id, start).await?;
        let turn = self.turn(&self.streams, client).await?;
        Ok(answer::stream(told(turn, move |outlet| async move {
            outlet.say(head.into()).await?;
            let mut ansi = Ansi::default();
            while reader.position() - start < FOLLOWED_BYTES {
                let piece = tokio::select! {
                    () = outlet.0.closed() => return Err(CutShort),
                    piece = reader.next() => piece.map_err(|_| CutShort)?,
                };
                let Some(piece) = piece else { break };
                outlet.say(ansi.html(&piece).into()).await?;
            }
            outlet.say(foot.into()).await
        })))
    }

    pub(super) async fn log_file(&self, ask: &Ask, id: BuildId) -> Result<Page, Problem> {
        let client = &ask.guest.client;
        let mut reader = self.scheduler.read_log(client, id, 0).await?;
        let turn = self.turn(&self.streams, client).await?;
        let contents = told(turn, |outlet| async move {
            while let Some(piece) = reader.available().await.map_err(|_| CutShort)? {
                outlet.say(piece).await?;
            }
            Ok(())
        });
        Ok(answer::download(format!("log-{id}.txt").as_bytes(), None, contents))
    }
}

fn unreadable(error: &RecordsError) -> Problem {
    Failure::from(error).into()
}

/// Where a task puts what a client reads.
struct Outlet(mpsc::Sender<Result<Bytes, CutShort>>);

impl Outlet {
    async fn say(&self, piece: Bytes) -> Result<(), CutShort> {
        let sent = timeout(PIECE_TIMEOUT, self.0.send(Ok(piece))).await;
        sent.map_err(|_| CutShort)?.map_err(|_| CutShort)
    }
}

/// What a task says. The turn is over when it ends.
fn told<F: Future<Output = Result<(), CutShort>> + Send + 'static>(
    turn: Turn,
    say: impl FnOnce(Outlet) -> F,
) -> impl futures::Stream<Item = Result<Bytes, CutShort>> + Send + 'static {
    let (sender, pieces) = mpsc::channel(1);
    let said = say(Outlet(sender.clone()));
    tokio::spawn(async move {
        let _turn = turn;
        if said.await.is_err() {
            drop(timeout(PIECE_TIMEOUT, sender.send(Err(CutShort))).await);
        }
    });
    received(pieces)
}

/// Lines that have this text, in upper or lower case, and where the search ended.
async fn search(mut reader: LogReader, find: &str) -> Result<(Vec<Hit>, u64), Problem> {
    let finder = AhoCorasick::builder().ascii_case_insensitive(true).build([find]);
    let finder = finder.map_err(|error| Problem::wrong(format!("this text can't be searched for: {error}")))?;
    let start = reader.position();
    let (mut hits, mut rest, mut at) = (Vec::new(), Vec::new(), start);
    while reader.position() - start < SEARCHED_BYTES {
        let piece = reader.available().await.map_err(|error| unreadable(&error))?;
        let is_last = piece.is_none();
        rest.extend_from_slice(&piece.unwrap_or_default());
        // A long line is cut anywhere.
        let newline = rest.iter().rposition(|byte| *byte == b'\n').map(|newline| newline + 1);
        let whole = if is_last { rest.len() } else { newline.unwrap_or(rest.len()) };
        let mut left = rest.split_off(whole);
        mem::swap(&mut rest, &mut left);
        if let Some(end) = hits_in(&finder, &left, at, &mut hits) {
            return Ok((hits, end));
        }
        at += left.len() as u64;
        if is_last {
            break;
        }
    }
    Ok((hits, at))
}

/// Adds the lines that were found. Returns the end of the last one if a page has no room for more.
fn hits_in(finder: &AhoCorasick, bytes: &[u8], at: u64, hits: &mut Vec<Hit>) -> Option<u64> {
    let mut line_end = 0;
    for found in finder.find_iter(bytes) {
        if found.start() < line_end {
            continue;
        }
        let (before, after) = (&bytes[..found.start()], &bytes[found.end()..]);
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        line_end =
            after.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |newline| found.end() + newline + 1);
        let shown_start = line_start.max(found.start().saturating_sub(AROUND_BYTES));
        let shown_end = line_end.min(found.end() + AROUND_BYTES);
        let mut ansi = Ansi::default();
        hits.push(Hit {
            offset: at + line_start as u64,
            before: ansi.html(&bytes[shown_start..found.start()]),
            found: ansi.html(&bytes[found.start()..found.end()]),
            after: ansi.html(bytes[found.end()..shown_end.max(found.end())].trim_ascii_end()),
        });
        if hits.len() == MAX_HITS {
            return Some(at + line_end as u64);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_once_and_shown_escaped() {
        let finder = AhoCorasick::builder().ascii_case_insensitive(true).build(["<b>"]).unwrap();
        let mut hits = Vec::new();
        assert_eq!(hits_in(&finder, b"a\nx <B> y <b>\n\nnone\n<b>", 1000, &mut hits), None);
        let shown: Vec<_> =
            hits.iter().map(|hit| (hit.offset, format!("{}|{}|{}", hit.before, hit.found, hit.after))).collect();
        assert_eq!(shown, [(1002, "x |&lt;B&gt;| y &lt;b&gt;".to_owned()), (1020, "|&lt;b&gt;|".to_owned())]);
    }

    #[test]
    fn a_page_has_so_many_lines() {
        let finder = AhoCorasick::new(["x"]).unwrap();
        let mut hits = Vec::new();
        let end = hits_in(&finder, &b"x\n".repeat(1000), 0, &mut hits);
        assert_eq!((hits.len(), end), (MAX_HITS, Some(2 * MAX_HITS as u64)));
    }
}
