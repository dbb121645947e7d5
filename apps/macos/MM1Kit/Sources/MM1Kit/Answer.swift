import Foundation

/// A stretch of an answer; the last one has no text but says how it ended.
public struct Piece: Sendable, Hashable {
    public let text: String
    /// In an answer's last piece, nil in all others.
    public let finish: Finish?
}

/// How an answer ended, and what it took.
public struct Finish: Sendable, Hashable {
    public enum Reason: String, Sendable, Codable {
        /// It came to its end, or to a stop string.
        case stop
        /// The most tokens or the context were reached.
        case length
    }

    public let reason: Reason
    public let usage: Usage
    public let timings: Timings
}

/// Tokens.
public struct Usage: Sendable, Hashable, Codable {
    public struct Details: Sendable, Hashable, Codable {
        /// Known from earlier requests, and not computed again.
        public let cachedTokens: Int
        /// Of pictures.
        public let imageTokens: Int
    }

    public let promptTokens: Int
    public let completionTokens: Int
    public let promptTokensDetails: Details
}

/// How long an answer took, in seconds, as the server measured it.
public struct Timings: Sendable, Hashable, Codable {
    /// From the question to the first token, waiting for other answers included.
    public let ttftSeconds: Double
    /// From the question to the last token.
    public let totalSeconds: Double
    /// After the first token.
    public let tokensPerSecond: Double
}

/// A whole answer.
public struct Answer: Sendable, Hashable {
    public let text: String
    public let finish: Finish
}

/// The pieces of one answer as they are written.
///
/// Every iteration asks once. An iteration that ends early, by `break` or because its task is
/// cancelled, closes the connection, and the server stops writing. A cancelled task's
/// iteration throws `CancellationError`, so that half an answer never looks whole.
public struct AnswerStream: AsyncSequence, Sendable {
    public typealias Element = Piece

    let open: @Sendable () throws -> Transfer

    public func makeAsyncIterator() -> Iterator {
        Iterator(open: open)
    }

    public struct Iterator: AsyncIteratorProtocol {
        let open: @Sendable () throws -> Transfer
        private var reply: Reply?
        private var parser = EventParser()
        private var events: ArraySlice<Data> = []
        private var ending = Ending()
        private var isOver = false

        init(open: @escaping @Sendable () throws -> Transfer) {
            self.open = open
        }

        /// The next piece, nil behind the last.
        ///
        /// - Throws: ``MM1Error``, or `CancellationError`.
        public mutating func next() async throws -> Piece? {
            if isOver { return nil }
            do {
                let piece = try await advance()
                if piece.finish != nil { end() }
                return piece
            } catch {
                end()
                throw error
            }
        }

        /// Closes the connection.
        private mutating func end() {
            isOver = true
            reply = nil
        }

        private mutating func advance() async throws -> Piece {
            var reply: Reply
            if let begun = self.reply { reply = begun } else { reply = try await Reply(open()) }
            defer { self.reply = reply }
            while true {
                while let event = events.popFirst() {
                    if event.elementsEqual("[DONE]".utf8) {
                        return Piece(text: "", finish: try ending.finish())
                    }
                    let text = try ending.read(event, head: reply.head)
                    if !text.isEmpty { return Piece(text: text, finish: nil) }
                }
                guard let bytes = try await reply.next() else {
                    throw MM1Error.interrupted("the server closed the connection")
                }
                events = parser.push(bytes)[...]
            }
        }
    }
}

/// What the chunks of a stream tell of its end, which comes in several of them.
private struct Ending {
    private var reason: Finish.Reason?
    private var usage: Usage?
    private var timings: Timings?

    /// The text of a chunk; what else it says is kept.
    mutating func read(_ event: Data, head: Head) throws -> String {
        let chunk: Chunk = try decode(event)
        if let fault = chunk.error {
            throw MM1Error.refused(ErrorReply(error: fault).refusal(head))
        }
        reason = chunk.choices?.first?.finishReason ?? reason
        usage = chunk.usage ?? usage
        timings = chunk.timings ?? timings
        return chunk.choices?.first?.delta.content ?? ""
    }

    func finish() throws -> Finish {
        guard let reason, let usage, let timings else {
            throw MM1Error.malformed("a stream ended without its reason or usage")
        }
        return Finish(reason: reason, usage: usage, timings: timings)
    }
}

private struct Chunk: Decodable {
    struct Choice: Decodable {
        struct Delta: Decodable {
            let content: String?
        }

        let delta: Delta
        let finishReason: Finish.Reason?
    }

    let choices: [Choice]?
    /// Instead of all others, where the answer failed after it had begun.
    let error: ErrorReply.Fault?
    let usage: Usage?
    let timings: Timings?
}
