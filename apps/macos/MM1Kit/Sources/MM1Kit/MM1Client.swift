import Foundation

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// Asks an `mm1 serve`.
///
///     let client = MM1Client(url: URL(string: "http://127.0.0.1:8080")!, key: key)
///     let question = Message.user("What is this?", [try Picture(contentsOf: file)])
///     for try await piece in client.stream([question]) {
///         print(piece.text, terminator: "")
///     }
///
/// A client holds no connection: it may be copied, and used by several tasks at once.
public struct MM1Client: Sendable, Hashable {
    /// Of the server, without a path.
    public let url: URL
    /// What its `--api-key-file` or `MM1_API_KEY` holds, nil where it has none.
    public let key: String?
    /// Seconds of silence after which a server is given up. Nothing comes before an answer's
    /// first token, of which a large model's prompt may take minutes.
    public let timeout: TimeInterval

    public init(url: URL, key: String? = nil, timeout: TimeInterval = 600) {
        self.url = url
        self.key = key
        self.timeout = timeout
    }

    /// An answer as it is written.
    public func stream(
        _ messages: [Message], options: AnswerOptions = AnswerOptions()
    ) -> AnswerStream {
        AnswerStream {
            var request = self.request("v1/chat/completions")
            request.httpMethod = "POST"
            request.setValue("application/json", forHTTPHeaderField: "Content-Type")
            request.httpBody = try JSONEncoder().encode(
                Question(messages: messages, options: options))
            return .of(request)
        }
    }

    /// A whole answer.
    ///
    /// - Throws: ``MM1Error``, or `CancellationError`.
    public func answer(
        _ messages: [Message], options: AnswerOptions = AnswerOptions()
    ) async throws -> Answer {
        var text = ""
        // Streamed too, since silence is then a fault and a cancelled task ends the answer.
        for try await piece in stream(messages, options: options) {
            text += piece.text
            if let finish = piece.finish { return Answer(text: text, finish: finish) }
        }
        throw MM1Error.malformed("a stream ended without its last piece")
    }

    /// The served models, and what they can do.
    ///
    /// - Throws: ``MM1Error``, or `CancellationError`.
    public func models() async throws -> [ServedModel] {
        var reply = try await Reply(.of(request("v1/models")))
        let list: ServedModels = try decode(await reply.rest())
        return list.data
    }

    /// Whether the server is well; needs no key. One that has failed says so, and is no error.
    ///
    /// - Throws: ``MM1Error``, or `CancellationError`.
    public func health() async throws -> Health {
        var reply = try await Reply(any: .of(request("health")))
        let body = try await reply.rest()
        guard [200, 503].contains(reply.head.status), let health: Health = try? decode(body)
        else { throw MM1Error.refused(Refusal(reply.head, body: body)) }
        return health
    }

    func request(_ path: String) -> URLRequest {
        var request = URLRequest(url: url.appendingPathComponent(path))
        // Set by itself, and in whole seconds: else Linux takes a minute, or cuts off to none.
        request.timeoutInterval = timeout.rounded(.up)
        request.setValue("MM1Kit/\(MM1Kit.version)", forHTTPHeaderField: "User-Agent")
        if let key {
            request.setValue("Bearer \(key)", forHTTPHeaderField: "Authorization")
        }
        return request
    }
}

/// An object of the API.
///
/// - Throws: ``MM1Error/malformed(_:)``.
func decode<T: Decodable>(_ data: Data) throws -> T {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    do {
        return try decoder.decode(T.self, from: data)
    } catch {
        let start = String(decoding: data.prefix(200), as: UTF8.self)
        throw MM1Error.malformed("\(T.self) expected, got \(start.debugDescription)")
    }
}
