import Foundation

/// Server-sent events out of bytes that arrive cut anywhere.
///
/// Source: WHATWG HTML, 9.2.6 "Interpreting an event stream"; of the fields `data` alone.
struct EventParser {
    private var line: [UInt8] = []
    private var event: [UInt8]?
    private var wasReturn = false

    /// The data of the events that these bytes complete, in their order.
    mutating func push(_ bytes: some Sequence<UInt8>) -> [Data] {
        var events: [Data] = []
        for byte in bytes {
            // A line ends with CR, LF, or both, of which the second may come later.
            let isSecond = wasReturn && byte == 0x0A
            wasReturn = byte == 0x0D
            if isSecond { continue }
            guard byte == 0x0A || byte == 0x0D else {
                line.append(byte)
                continue
            }
            if let data = endLine() { events.append(data) }
        }
        return events
    }

    private mutating func endLine() -> Data? {
        defer { line.removeAll(keepingCapacity: true) }
        if line.isEmpty {
            defer { event = nil }
            return event.map { Data($0) }
        }
        guard line.starts(with: "data".utf8) else { return nil }
        var value = line.dropFirst(4)
        if !value.isEmpty {
            guard value.removeFirst() == UInt8(ascii: ":") else { return nil }
            if value.first == UInt8(ascii: " ") { value.removeFirst() }
        }
        event = event.map { $0 + [0x0A] + value } ?? Array(value)
        return nil
    }
}
