//! Fuzzes the decoder of messages between host and guest.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::guest_frames(bytes);
});
