import Foundation

/// Bytes into the lines of a text, whose last one may lack its end.
struct LineSplitter {
    private var rest: [UInt8] = []
    // Of a line; a child that writes without end is not kept in memory.
    static let longest = 1 << 16

    /// The lines that these bytes complete.
    mutating func push(_ bytes: some Sequence<UInt8>) -> [String] {
        var lines: [String] = []
        for byte in bytes {
            if byte == 0x0A || rest.count == Self.longest {
                lines.append(String(decoding: rest, as: UTF8.self))
                rest.removeAll(keepingCapacity: true)
            }
            if byte != 0x0A { rest.append(byte) }
        }
        return lines
    }

    /// What is left behind the last line's end.
    var last: String? {
        rest.isEmpty ? nil : String(decoding: rest, as: UTF8.self)
    }
}

/// The lines that another process writes, until its end of the pipe closes.
func lines(of pipe: Pipe) -> AsyncStream<String> {
    AsyncStream { continuation in
        // A thread that blocks, and read(2): `FileHandle` waits for whole buffers on one
        // system and ends the app for an error on the other.
        let reader = Thread {
            var splitter = LineSplitter()
            var buffer = [UInt8](repeating: 0, count: 4096)
            while true {
                let count = read(pipe.fileHandleForReading.fileDescriptor, &buffer, 4096)
                if count < 0 && errno == EINTR { continue }
                if count <= 0 { break }
                for line in splitter.push(buffer[..<count]) { continuation.yield(line) }
            }
            if let last = splitter.last { continuation.yield(last) }
            continuation.finish()
        }
        reader.name = "mm1-lines"
        reader.start()
    }
}
